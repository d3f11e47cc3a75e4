"""The 70B-geometry benchmark's command, at a tiny geometry."""

import json
import runpy

import pytest

from comol_ds.benchmark import geometry
from tests.distributed.launching import REPOSITORY

TINY = geometry.LLAMA_3_1_70B | {
    "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 1024,
}  # fmt: skip
PARAMETERS = 2 * 1024 * 64 + 3 * (2 * 64 * 64 + 2 * 64 * 16 + 3 * 64 * 96 + 2 * 64) + 64


def test_the_geometry_is_that_of_llama_3_1_70b():
    sizes = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")
    assert [geometry.LLAMA_3_1_70B[name] for name in sizes] == [8192, 64, 8, 28672, 128256]


@pytest.mark.exhaustive
@pytest.mark.distributed
def test_command_trains_both_layouts(tmp_path, capsys, extensions, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(extensions))
    monkeypatch.setattr(geometry, "LLAMA_3_1_70B", TINY)
    main = runpy.run_path(str(REPOSITORY / "launch" / "benchmark.py"))["main"]
    out = tmp_path / "out.json"
    assert main(["geometry", "--layers", "3", "--steps", "2", "--tokens", "16", "--json", str(out)]) == 0
    (result,) = json.loads(out.read_text())["results"]
    assert result["case"]["parameters"] == PARAMETERS
    assert list(result["layouts"]) == ["zero3", "tp2"]
    for run in result["layouts"].values():
        assert len(run["seconds"]) == 2 and min(run["seconds"]) > 0
        assert len(run["peak_bytes"]) == 2
        assert all(nbytes > run["planned_peak_bytes"] > 0 for nbytes in run["peak_bytes"]), (
            "an interpreter is no tensor"
        )
    assert [run["tokens_per_step"] for run in result["layouts"].values()] == [32, 16]
    printed = capsys.readouterr().out
    assert "3 layers" in printed and "planned: tensors alone" in printed
