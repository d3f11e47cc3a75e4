"""Two ranks whose mixtures run in Triton's kernels, in its interpreter, against one plain process without them."""

import pytest
import torch

from tests.adapters.require_triton import require_triton
from tests.distributed.equality_cases import KERNEL_CASES
from tests.distributed.one_process import assert_equals_one_process
from tests.distributed.suites import suite_trainer
from tests.tiny_models import FAMILIES

# 19 s for the one launch, half of it the interpreter's
pytestmark = [pytest.mark.distributed, pytest.mark.slow]
ADAPTED = 7 * FAMILIES["llama"].num_hidden_layers  # all-linear


@pytest.fixture(scope="module")
def two_ranks(models, tmp_path_factory, extensions):
    require_triton()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("COMOL_KERNEL", "triton")
        environment.setenv("TRITON_INTERPRET", "1")
        return suite_trainer("kernel_worker.py", {"kernels": 2}, models, tmp_path_factory, extensions)("kernels")


@pytest.mark.parametrize("case", KERNEL_CASES, ids=lambda case: case.name)
def test_equals_one_process_without_the_kernels(case, two_ranks, models, monkeypatch):
    monkeypatch.setenv("COMOL_KERNEL", "torch")
    assert_equals_one_process(torch.load(two_ranks / f"{case.name}.pt"), case, str(models))


@pytest.mark.parametrize("case", KERNEL_CASES, ids=lambda case: case.name)
def test_every_mixture_of_every_rank_runs_in_the_kernels(case, two_ranks):
    passes = ADAPTED * case.steps * case.accumulation
    forward = 2 * passes if case.checkpointing == "full" else passes
    found = torch.load(two_ranks / f"{case.name}.pt")["kernels"]
    assert found == [{"forward": forward, "backward": passes}] * 2
