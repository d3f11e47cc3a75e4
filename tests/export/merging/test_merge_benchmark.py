"""The merging benchmark's command at a small size: it measures both contenders, and the merge keeps its promises."""

import json
import runpy
from pathlib import Path

import pytest

pytestmark = pytest.mark.exhaustive


def test_command_measures_copy_and_merge(tmp_path, capsys):
    main = runpy.run_path(str(Path(__file__).parents[3] / "launch" / "benchmark.py"))["main"]
    out = tmp_path / "out.json"
    assert main(["merge", "--gigabytes", "0.1", "--rounds", "1", "--folder", str(tmp_path), "--json", str(out)]) == 0
    (result,) = json.loads(out.read_text())["results"]
    assert result["differing"] == []
    assert 2**20 < result["peak_bytes"] < 2**28 < result["case"]["bytes"]
    assert result["peak_bytes"] < result["block_bytes"] + 2**30
    for cache in ("warm", "cold"):
        assert 0 < result["speed_to_copy"][cache] < 2
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"], "the checkpoints are deleted"
    assert "peak memory of a merge" in capsys.readouterr().out
