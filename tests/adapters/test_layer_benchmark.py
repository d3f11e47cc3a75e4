"""The layer benchmark's command at a small size: it must time what it says and compute the same thing twice."""

import json
import runpy
from pathlib import Path

import pytest
import torch

from comol_ds.benchmark.layer import LayerCase, authors_contender, comol_contender, lora_contender, saved_bytes

ROOT = Path(__file__).parents[2]


def test_command_writes_every_contender(tmp_path, capsys):
    main = runpy.run_path(str(ROOT / "launch" / "benchmark.py"))["main"]
    sizes = ["--tokens", "32", "--in_features", "48", "--out_features", "40", "--r", "8", "--num_experts", "4"]
    assert main(["layer", *sizes, "--rounds", "3", "--device", "cpu", "--json", str(tmp_path / "out.json")]) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert [result["case"]["dtype"] for result in report["results"]] == ["fp32", "bf16"]
    assert report["machine"]["torch"] == torch.__version__
    for result in report["results"]:
        assert result["milliseconds"].keys() == {"comol", "lora", "authors"}
        assert result["ratio_to_lora"]["lora"] == 1
        assert all(0 < time["minimum"] <= time["median"] for time in result["milliseconds"].values())
    assert report["results"][0]["saved_bytes_per_token"]["comol"] == 4 * (2 * 8 + 4)
    assert "x lora" in capsys.readouterr().out


def test_the_materialised_form_is_the_same_function():
    case = LayerCase(tokens=16, in_features=24, out_features=20, r=8, num_experts=4)
    comol, authors = comol_contender(case), authors_contender(case)
    with torch.no_grad():
        for mine, theirs in zip(comol.parameters, authors.parameters, strict=True):
            theirs.copy_(mine)
    x = torch.randn(16, 24)
    torch.testing.assert_close(comol.function(x), authors.function(x))


def test_the_lora_path_is_pefts():
    case = LayerCase(tokens=16, in_features=24, out_features=20, r=8)
    lora = lora_contender(case)
    x = torch.randn(16, 24)
    down, up = lora.parameters
    torch.testing.assert_close(lora.function(x), x @ down.T @ up.T)


@pytest.mark.parametrize("r", [16, 64])
def test_the_materialised_form_keeps_a_core_per_token(r):
    case = LayerCase(tokens=64, in_features=32, out_features=32, r=r)
    authors = authors_contender(case)
    x = torch.randn(64, 32, requires_grad=True)
    assert saved_bytes(lambda: authors.function(x), x, *authors.parameters) / 64 > 4 * r * r
