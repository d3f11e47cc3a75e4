"""The command that measures what router statistics cost, at a size that says nothing about it."""

import json
import subprocess
import sys

import pytest

from comol_ds.benchmark.router_load import CONTENDERS
from tests.distributed.case_runner import REPOSITORY
from tests.distributed.launching import clean_environment


@pytest.mark.exhaustive
def test_every_contender_takes_its_turns(tmp_path, extensions):
    out = tmp_path / "out.json"
    command = [sys.executable, str(REPOSITORY / "launch" / "benchmark.py"), "router-load", "--hidden", "64"]
    command += ["--layers", "1", "--tokens", "64", "--rounds", "2", "--json", str(out)]
    run = subprocess.run(command, env=clean_environment(extensions), capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    (result,) = json.loads(out.read_text())["results"]
    assert set(result["seconds"]) == set(CONTENDERS)
    assert all(0 < taken["minimum"] <= taken["median"] <= taken["maximum"] for taken in result["seconds"].values())
    ratios = result["ratio_to_off"]
    assert ratios["off"] == 1 and ratios["amortized"] == (9 * ratios["on"] + ratios["logged"]) / 10
    assert "one step in 10 logged" in run.stdout
