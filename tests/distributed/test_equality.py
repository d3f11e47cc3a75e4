"""DeepSpeed on two ranks against one plain PyTorch process: losses, gradient norms and adapter weights in fp32."""

from pathlib import Path

import pytest
import torch

from tests.distributed.equality_cases import BF16_CASES, CASES
from tests.distributed.launching import run_deepspeed
from tests.distributed.one_process import (
    assert_bf16_training,
    assert_equal_router_load,
    assert_equal_training,
    expected_of,
)
from tests.tiny_models import FAMILIES, save_tiny_model


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, extensions):
    """Every case trained once by two processes; the processes start once."""
    folder = tmp_path_factory.mktemp("equality")
    for family in FAMILIES:
        save_tiny_model(folder / family, family)
    worker = Path(__file__).parent / "equality_worker.py"
    run = run_deepspeed(2, worker, ["zero", str(folder), str(folder)], extensions, timeout=280)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_one_process(case, two_ranks):
    assert_equal_training(torch.load(two_ranks / f"{case.name}.pt"), expected_of(case, str(two_ranks)))


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_router_load_counts_every_token_once(case, two_ranks):
    """However the batch is split, and whether or not the layers are recomputed."""
    found = torch.load(two_ranks / f"{case.name}.pt")
    assert_equal_router_load(found["load"], case, expected_of(case, str(two_ranks))["load"])


@pytest.mark.distributed
@pytest.mark.parametrize("case", BF16_CASES, ids=lambda case: case.name)
def test_bf16_stays_near_fp32_and_saves_master_weights(case, two_ranks):
    assert_bf16_training(torch.load(two_ranks / f"{case.name}.pt"), case, str(two_ranks))
