"""DeepSpeed on two ranks against one plain PyTorch process: losses, gradient norms and adapter weights in fp32."""

import pytest
import torch

from tests.distributed.equality_cases import BF16_CASES, CASES
from tests.distributed.one_process import (
    assert_bf16_training,
    assert_equal_router_load,
    assert_equal_training,
    expected_of,
)
from tests.distributed.suites import suite_trainer


@pytest.fixture(scope="module")
def two_ranks(models, tmp_path_factory, extensions):
    """Every case trained once by two processes; the processes start once."""
    return suite_trainer("equality_worker.py", {"zero": 2}, models, tmp_path_factory, extensions)("zero")


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_one_process(case, two_ranks, models):
    assert_equal_training(torch.load(two_ranks / f"{case.name}.pt"), expected_of(case, str(models)))


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_router_load_counts_every_token_once(case, two_ranks, models):
    """However the batch is split, and whether or not the layers are recomputed."""
    found = torch.load(two_ranks / f"{case.name}.pt")
    assert_equal_router_load(found, expected_of(case, str(models)))


@pytest.mark.distributed
@pytest.mark.parametrize("case", BF16_CASES, ids=lambda case: case.name)
def test_bf16_stays_near_fp32_and_saves_master_weights(case, two_ranks, models):
    assert_bf16_training(torch.load(two_ranks / f"{case.name}.pt"), case, str(models))
