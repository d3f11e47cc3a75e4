"""The layer benchmark's command at a small size: it must time what it says and compute the same thing twice."""

import json
import runpy
from pathlib import Path

import pytest
import torch

from comol_ds.benchmark.contenders import (
    CONTENDERS,
    LayerCase,
    authors_contender,
    comol_contender,
    hydralora_contender,
    lora_contender,
    molora_contender,
)
from comol_ds.benchmark.layer import FEWEST_ROUNDS, measure_layer

ROOT = Path(__file__).parents[2]
SMALL = LayerCase(tokens=16, in_features=24, out_features=20, r=8, num_experts=4)


def test_command_writes_every_contender(tmp_path, capsys):
    main = runpy.run_path(str(ROOT / "launch" / "benchmark.py"))["main"]
    sizes = ["--tokens", "32", "--in_features", "48", "--out_features", "40", "--r", "8", "--num_experts", "4", "6"]
    assert main(["layer", *sizes, "--rounds", "3", "--device", "cpu", "--json", str(tmp_path / "out.json")]) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    cases = [(result["case"]["dtype"], result["case"]["num_experts"]) for result in report["results"]]
    assert cases == [("fp32", 4), ("fp32", 6), ("bf16", 4), ("bf16", 6)]
    assert report["machine"]["torch"] == torch.__version__
    for (_, num_experts), result in zip(cases, report["results"], strict=True):
        assert set(result["milliseconds"]) == (set(CONTENDERS) if num_experts == 4 else set(CONTENDERS) - {"base"})
        assert result["ratio_to_lora"]["lora"] == 1
        assert all(0 < time["minimum"] <= time["median"] for time in result["milliseconds"].values())
    assert "x lora" in capsys.readouterr().out


def test_flops_and_bytes_are_those_of_the_equations():
    result = measure_layer(SMALL, rounds=2)
    n, i, o, r, e = SMALL.tokens, SMALL.in_features, SMALL.out_features, SMALL.r, SMALL.num_experts
    per_token = {
        "base": 4 * i * o,
        "lora": 6 * r * (i + o),
        # three products with the router and with the stacked cores; gradients of h and p by one product each
        "comol": 6 * r * (i + o) + 6 * e * r + 6 * e * r * r + 4 * e * r,
        "molora": 6 * e * r * (i + o) + 6 * e * i,
        "hydralora": 6 * r * (i + e * o) + 6 * e * i,
    }
    assert {name: result["flops"][name] for name in per_token} == {name: n * f for name, f in per_token.items()}
    assert result["saved_bytes_per_token"]["comol"] == 4 * (2 * r + e)
    assert result["saved_bytes_per_token"]["base"] == 0
    # at the least the output, the gradient of x, and the gradients of the parameters
    assert result["peak_bytes"]["base"] == 4 * n * (i + o)
    for name in ("comol", "lora"):
        assert 4 * (n * (i + o) + r * (i + o)) <= result["peak_bytes"][name] < result["peak_bytes"]["authors"]


def test_a_contender_without_seconds_left_has_few_turns():
    assert measure_layer(SMALL, rounds=5, names=("lora",), seconds=0)["rounds"] == {"lora": FEWEST_ROUNDS}
    assert measure_layer(SMALL, rounds=5, names=("lora",), seconds=60)["rounds"] == {"lora": 5}


def test_the_materialised_form_is_the_same_function():
    comol, authors = comol_contender(SMALL), authors_contender(SMALL)
    with torch.no_grad():
        for mine, theirs in zip(comol.parameters, authors.parameters, strict=True):
            theirs.copy_(mine)
    x = torch.randn(16, 24)
    torch.testing.assert_close(comol.function(x), authors.function(x))


def test_the_lora_path_is_pefts():
    lora = lora_contender(SMALL)
    x = torch.randn(16, 24)
    down, up = lora.parameters
    torch.testing.assert_close(lora.function(x), x @ down.T @ up.T)


@pytest.mark.parametrize(("build", "downs"), [(molora_contender, 4), (hydralora_contender, 1)])
def test_the_mixtures_compute_their_equations(build, downs):
    contender = build(SMALL)
    router, *parameters = contender.parameters
    down, up = torch.stack(parameters[:downs]), torch.stack(parameters[downs:])  # [E or 1, R, I], [E, O, R]
    assert up.shape == (4, 20, 8)
    x = torch.randn(16, 24)
    p = torch.softmax(x @ router.T, dim=-1)
    experts = torch.einsum("ni,eri,eor->eno", x, down.expand(4, -1, -1), up)
    torch.testing.assert_close(contender.function(x), torch.einsum("ne,eno->no", p, experts))


@pytest.mark.parametrize("r", [16, 64])
def test_the_materialised_form_keeps_a_core_per_token(r):
    result = measure_layer(LayerCase(tokens=64, in_features=32, out_features=32, r=r), 2, ("lora", "authors"))
    assert result["saved_bytes_per_token"]["authors"] > 4 * r * r
