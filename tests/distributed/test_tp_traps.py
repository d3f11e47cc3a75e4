"""Known ways to get tensor parallelism silently wrong, each taken on purpose: the equality test must notice."""

from pathlib import Path

import pytest
import torch

from tests.distributed.launching import run_deepspeed
from tests.distributed.one_process import TOLERANCE, assert_equal_training, expected_of, relative
from tests.distributed.traps_worker import (
    CASE,
    TRAPS,
    drawn_per_shard,
    input_gradient_left,
    nothing_broken,
    other_batches_for_peers,
    partial_gradients_left,
    partitioned_over_world,
    routed_on_partial_sums,
    summed_after_routing,
    with_hpz,
    without_attribute,
)
from tests.tiny_models import save_tiny_model

pytestmark = [pytest.mark.distributed, pytest.mark.exhaustive]

EVERY_TRAP = pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.__name__)
FORWARD_BROKEN = [partitioned_over_world, with_hpz, other_batches_for_peers]
FORWARD_RIGHT_AT_FIRST = [trap for trap in TRAPS if trap not in FORWARD_BROKEN]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_tiny_model(folder / "llama", "llama")
    return folder


@pytest.fixture(scope="module")
def expected(models):
    return expected_of(CASE, str(models))


@pytest.fixture(scope="module")
def outcome(models, tmp_path_factory, extensions):
    """Trap -> what its training came to; one launch of TP2 x DP2 trains them all."""
    folder = tmp_path_factory.mktemp("traps")
    worker = Path(__file__).parent / "traps_worker.py"
    run = run_deepspeed(4, worker, [str(models), str(folder)], extensions)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return lambda trap: torch.load(folder / f"{trap.__name__}.pt")


def errors(found: list[float], expected: list[float]) -> list[float]:
    """Relative error of every step."""
    return [abs(a - b) / b for a, b in zip(found, expected, strict=True)]


def test_unbroken_training_equals_one_process(outcome, expected):
    assert_equal_training(outcome(nothing_broken), expected)


@EVERY_TRAP
def test_equality_test_fails_in_the_trap(trap, outcome, expected):
    found = outcome(trap)
    with pytest.raises(AssertionError):
        assert_equal_training(found, expected)


@EVERY_TRAP
def test_adapter_of_the_trap_is_far_from_that_of_one_process(trap, outcome, expected):
    found = outcome(trap)["weights"]
    assert max(relative(found[name], weight) for name, weight in expected["weights"].items()) > 20 * TOLERANCE


@pytest.mark.parametrize("trap", FORWARD_BROKEN)
def test_first_loss_shows_a_broken_forward(trap, outcome, expected):
    assert errors(outcome(trap)["losses"], expected["losses"])[0] > 20 * TOLERANCE


@pytest.mark.parametrize("trap", FORWARD_RIGHT_AT_FIRST)
def test_first_loss_tells_nothing_of_a_broken_adapter_or_backward(trap, outcome, expected):
    """B is 0 at first: whoever compares one forward sees no difference."""
    assert errors(outcome(trap)["losses"], expected["losses"])[0] <= TOLERANCE


def test_missing_attribute_is_seen_in_the_gradient_norm(outcome, expected):
    """Half of what is sharded is not counted, here 8 to 19 % of the norm; clipping is then wrong, the losses hardly."""
    found = outcome(without_attribute)
    assert min(errors(found["norms"], expected["norms"])) > 5e-2
    assert max(errors(found["losses"][:2], expected["losses"][:2])) <= TOLERANCE


def test_partitioning_over_world_gives_every_tensor_parallel_rank_the_slices_of_rank_0(outcome, expected):
    sharded = [name for name in expected["weights"] if name.endswith(("o_proj.comol_A", "down_proj.comol_A"))]
    assert len(sharded) == 4  # two per layer: row-parallel, split on I
    for name in sharded:
        left, right = outcome(partitioned_over_world)["weights"][name].chunk(2, dim=1)
        assert torch.equal(left, right)
        assert relative(*expected["weights"][name].chunk(2, dim=1)) > 0.1


@pytest.mark.parametrize("trap", [routed_on_partial_sums, summed_after_routing, input_gradient_left, drawn_per_shard])
def test_first_gradient_norm_shows_a_broken_adapter_or_backward(trap, outcome, expected):
    assert errors(outcome(trap)["norms"], expected["norms"])[0] > 20 * TOLERANCE


def test_a_sum_after_routing_is_not_seen_in_the_losses_of_a_short_run(outcome, expected):
    assert max(errors(outcome(summed_after_routing)["losses"], expected["losses"])) <= TOLERANCE


def test_partial_gradients_are_seen_only_once_b_has_moved(outcome, expected):
    """While B is 0, A, cores and router have no gradient: a test of two steps would let this pass."""
    found = errors(outcome(partial_gradients_left)["norms"], expected["norms"])
    assert max(found[:2]) <= TOLERANCE
    assert min(found[2:]) > TOLERANCE
