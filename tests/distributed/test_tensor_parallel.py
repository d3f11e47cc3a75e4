"""Tensor parallelism with every ZeRO stage on two and four ranks against one plain PyTorch process, in fp32."""

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
from tests.distributed.one_process import (
    assert_bf16_training,
    assert_equal_training,
    assert_equals_one_process,
)
from tests.distributed.suites import suite_trainer

pytestmark = pytest.mark.distributed
RANKS = {"tp2": 2, "tp2dp2": 4, "tp4": 4, "tp2dp2-variations": 4}
CASES = {"tp2": TP2_CASES, "tp2dp2": TP2_DP2_CASES, "tp4": TP4_CASES, "tp2dp2-variations": TP2_DP2_VARIATIONS}
RUNS = [
    pytest.param(
        suite,
        case,
        id=f"{suite}-{case.name}",
        marks=[pytest.mark.slow] if RANKS[suite] > 2 else [],
    )
    for suite, cases in CASES.items()
    for case in cases
]


@pytest.fixture(scope="module")
def trained(models, tmp_path_factory, extensions):
    return suite_trainer("equality_worker.py", RANKS, models, tmp_path_factory, extensions)


@pytest.mark.parametrize(("suite", "case"), RUNS)
def test_equals_one_process(suite, case, trained, models):
    assert_equals_one_process(torch.load(trained(suite) / f"{case.name}.pt"), case, str(models))


@pytest.mark.slow
@pytest.mark.parametrize("case", TP_BF16_CASES, ids=lambda case: case.name)
def test_bf16_stays_near_fp32_and_saves_master_weights(case, trained, models):
    assert_bf16_training(torch.load(trained("tp2dp2") / f"{case.name}.pt"), case, str(models))


def test_recomputation_draws_the_masks_of_the_first_pass(trained):
    plain, recomputed = (torch.load(trained("tp2") / f"{case.name}.pt") for case in DROPOUT_CASES)
    assert_equal_training(recomputed, plain)
