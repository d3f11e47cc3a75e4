"""Tensor parallelism with every ZeRO stage on two and four ranks against one plain PyTorch process, in fp32."""

import json
from pathlib import Path

import pytest
import torch

from tests.distributed.equality_cases import (
    DROPOUT_CASES,
    TP2_CASES,
    TP2_DP2_CASES,
    TP2_DP2_VARIATIONS,
    TP4_CASES,
    TP_BF16_CASES,
)
from tests.distributed.launching import run_deepspeed
from tests.distributed.one_process import (
    assert_bf16_training,
    assert_equal_router_load,
    assert_equal_training,
    expected_of,
)
from tests.tiny_models import FAMILIES, save_tiny_model

pytestmark = pytest.mark.distributed
RANKS = {"tp2": 2, "tp2dp2": 4, "tp4": 4, "tp2dp2-variations": 4}
CASES = {"tp2": TP2_CASES, "tp2dp2": TP2_DP2_CASES, "tp4": TP4_CASES, "tp2dp2-variations": TP2_DP2_VARIATIONS}
RUNS = [
    pytest.param(
        suite,
        case,
        id=f"{suite}-{case.name}",
        marks=[pytest.mark.slow] if suite in ("tp4", "tp2dp2-variations") else [],
    )
    for suite, cases in CASES.items()
    for case in cases
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        save_tiny_model(folder / family, family)
    plan = {f"layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"} | {"layers.*.self_attn.o_proj": "rowwise"}
    (folder / "attention_only.json").write_text(json.dumps(plan))
    return folder


@pytest.fixture(scope="module")
def trained(models, tmp_path_factory, extensions):
    """Suite -> folder with every case trained; a suite's processes start once, when its first case is asked for."""
    folders = {}

    def train(suite: str) -> Path:
        if suite not in folders:
            folders[suite] = tmp_path_factory.mktemp(suite)
            worker = Path(__file__).parent / "equality_worker.py"
            words = [suite, str(models), str(folders[suite])]
            run = run_deepspeed(RANKS[suite], worker, words, extensions, timeout=280)
            assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
        return folders[suite]

    return train


@pytest.mark.parametrize(("suite", "case"), RUNS)
def test_equals_one_process(suite, case, trained, models):
    found = torch.load(trained(suite) / f"{case.name}.pt")
    expected = expected_of(case, str(models))
    assert_equal_training(found, expected)
    assert_equal_router_load(found["load"], case, expected["load"])


@pytest.mark.parametrize("case", TP_BF16_CASES, ids=lambda case: case.name)
def test_bf16_stays_near_fp32_and_saves_master_weights(case, trained, models):
    assert_bf16_training(torch.load(trained("tp2dp2") / f"{case.name}.pt"), case, str(models))


def test_recomputation_draws_the_masks_of_the_first_pass(trained):
    plain, recomputed = (torch.load(trained("tp2") / f"{case.name}.pt") for case in DROPOUT_CASES)
    assert_equal_training(recomputed, plain)
