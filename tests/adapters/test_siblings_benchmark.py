"""The benchmark of layers that read the same tensor: its contenders compute the same thing, and take turns."""

import json
import runpy
from pathlib import Path

import pytest
import torch

from comol_ds.adapters.shared_down import SIBLINGS
from comol_ds.benchmark.siblings import OUT_FEATURES, SiblingsCase, comol_contender, lora_contenders

ROOT = Path(__file__).parents[2]
SMALL = SiblingsCase(out_features=(12, 6, 6), tokens=16, in_features=24, r=8, num_experts=4)


def test_command_times_every_contender(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(OUT_FEATURES, "gate_proj", 48)
    monkeypatch.setitem(OUT_FEATURES, "up_proj", 48)
    main = runpy.run_path(str(ROOT / "launch" / "benchmark.py"))["main"]
    sizes = ["--tokens", "4", "--r", "8", "--num_experts", "4", "6", "--dtypes", "fp32"]
    assert main(["siblings", *sizes, "--rounds", "2", "--device", "cpu", "--json", str(tmp_path / "out.json")]) == 0
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [result["case"]["names"] for result in results] == [list(names) for names in SIBLINGS for _ in range(2)]
    for result in results:
        assert set(result["seconds"]) == {"together", "apart", "lora"}
        assert set(result["ratio"]) == {"together / apart", "together / lora", "apart / lora"}
    assert capsys.readouterr().out.count("together / apart") == 4


def test_together_and_apart_are_the_same_function():
    together, apart = comol_contender(SMALL, together=True), comol_contender(SMALL, together=False)
    with torch.no_grad():
        for mine, theirs in zip(together.parameters, apart.parameters, strict=True):
            theirs.copy_(mine)
    x = torch.randn(16, 24)
    torch.testing.assert_close(together.function(x), apart.function(x))
    assert together.function(x).shape == lora_contenders(SMALL).function(x).shape == (16, 24)


@pytest.mark.parametrize("together", [True, False])
def test_the_gradients_that_are_timed_are_all_of_them(together):
    contender = comol_contender(SMALL, together)
    assert len(contender.parameters) == 3 * 4
    x = torch.randn(16, 24, requires_grad=True)
    gradients = torch.autograd.grad(contender.function(x).sum(), [x, *contender.parameters])
    assert all(gradient.abs().max() > 0 for gradient in gradients)
