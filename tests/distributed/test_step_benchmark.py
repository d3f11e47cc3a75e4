"""The commands that time and count training steps, at a size that says nothing about time and all about collectives."""

import json
import runpy
import subprocess
import sys

import pytest

from comol_ds.benchmark.step import LAYOUTS
from comol_ds.benchmark.whole_models import ATTACH
from tests.distributed.case_runner import REPOSITORY
from tests.distributed.launching import clean_environment

pytestmark = [pytest.mark.distributed, pytest.mark.exhaustive]
SMALL = ["--hidden", "64", "--layers", "1", "--tokens", "64"]


@pytest.fixture
def run_suite(tmp_path, extensions):
    """Runs a suite of launch/benchmark.py: (its results, what it printed)."""

    def call(*words: str) -> tuple[list[dict], str]:
        out = tmp_path / "out.json"
        command = [sys.executable, str(REPOSITORY / "launch" / "benchmark.py"), *words, "--json", str(out)]
        run = subprocess.run(command, env=clean_environment(extensions), capture_output=True, text=True, timeout=400)
        assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
        return json.loads(out.read_text())["results"], run.stdout

    return call


def test_the_flags_offer_every_layout_and_contender():
    command = runpy.run_path(str(REPOSITORY / "launch" / "benchmark.py"))
    assert command["LAYOUTS"] == tuple(LAYOUTS)
    assert command["STEP_CONTENDERS"] == tuple(ATTACH)


@pytest.mark.parametrize(
    ("layout", "contenders", "reference"),
    [("zero3-1", ["comol", "lora", "molora", "hydralora", "frozen"], "lora"), ("tp2", ["comol", "frozen"], "frozen")],
)
def test_contenders_of_a_layout_take_their_turns(run_suite, layout, contenders, reference):
    (result,), said = run_suite("step", *SMALL, "--geometries", "tiny", "--layouts", layout, "--rounds", "2")
    assert list(result["seconds"]) == contenders
    assert all(0 < taken["minimum"] <= taken["median"] <= taken["maximum"] for taken in result["seconds"].values())
    assert result["reference"] == reference and result["ratio"][reference] == 1
    assert f"/ {reference}" in said


def test_comol_sends_as_often_as_lora_and_little_more(run_suite):
    (zero3, tensor_parallel), said = run_suite("collectives", *SMALL)
    comol, lora, frozen = (zero3["collectives"][name] for name in ("comol", "lora", "frozen"))
    calls = {kind: sums["calls"] for kind, sums in lora.items()}
    # embedding, layer, norm and head, forward and backward; tokens, loss, gradient norm
    assert calls == {"gathers": 2 * 4, "reduces": 1, "all-reduces": 3}
    assert {kind: sums["calls"] for kind, sums in comol.items()} == calls
    assert frozen["gathers"]["bytes"] < lora["gathers"]["bytes"] < comol["gathers"]["bytes"]
    cores_and_routers = 5 * 8 * (16 * 16 + 16) * 4  # 5 adapted Linears
    # padded to an even number of elements at most
    assert 0 <= comol["reduces"]["bytes"] - lora["reduces"]["bytes"] - cores_and_routers < 1024
    comol, frozen = (tensor_parallel["collectives"][name]["TP all-reduces"] for name in ("comol", "frozen"))
    assert comol["calls"] == frozen["calls"] + 1, "the partial gradients of the whole model"
    assert "TP all-reduces" in said
