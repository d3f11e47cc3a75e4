"""The loading benchmark's command at a small size: what it says of bytes and memory is within the loader's promise."""

import json
import runpy

import pytest

from tests.distributed.launching import REPOSITORY

pytestmark = [pytest.mark.distributed, pytest.mark.exhaustive]


def test_command_measures_every_contender_on_every_rank(tmp_path, capsys, extensions, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(extensions))
    main = runpy.run_path(str(REPOSITORY / "launch" / "benchmark.py"))["main"]
    out = tmp_path / "out.json"
    assert main(["load", "--gigabytes", "0.1", "--rounds", "1", "--folder", str(tmp_path), "--json", str(out)]) == 0
    (result,) = json.loads(out.read_text())["results"]
    assert result["ratio_to_transformers"]["transformers"] == 1
    for name in ("comol_ds", "comol_ds-tp"):
        ranks = result["ranks"][name]
        # vectors are whole on both tensor-parallel ranks
        assert result["case"]["bytes"] <= sum(rank["held_bytes"] for rank in ranks) < 1.001 * result["case"]["bytes"]
        for rank in ranks:
            assert rank["held_bytes"] <= rank["asked_bytes"] < 1.05 * rank["held_bytes"]
            assert rank["excess_bytes"] < 2**30
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"], "the checkpoint is deleted"
    assert "x transformers" in capsys.readouterr().out
