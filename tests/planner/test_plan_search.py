"""What the planner proposes when a run does not fit: the fewest changes, the least painful first."""

import pytest

from comol_ds.planner.plan import Planner
from comol_ds.planner.search import RESERVED_FRACTION, available, nearest_fit
from tests.planner.geometries import LLAMA_SMALL, request, save_config, template

RANKS = 8
# otherwise ZeRO-3 keeps all of a model of this size gathered
GATHER_LITTLE = {f"stage3_{name}": 0 for name in ("prefetch_bucket_size", "max_live_parameters", "max_reuse_distance")}
FLAGS = ("--max_length", 1024, "--per_device_train_batch_size", 4)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_config(LLAMA_SMALL, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def planner():
    return Planner()


@pytest.fixture
def nearest(model, planner):
    """The changes that make a run fit a device with so much memory for tensors; None if nothing does."""

    def search(nbytes: float, ds_json: dict, *flags) -> list[str] | None:
        asked = request(model, RANKS, ds_json, *FLAGS, *flags)
        assert planner.plan(asked).peak > nbytes, "it fits as it is"
        found = nearest_fit(planner, asked, ds_json, device_memory=round(nbytes / (1 - RESERVED_FRACTION)) + 1)
        if found is None:
            return None
        changes, plan = found
        assert plan.peak <= nbytes
        assert plan.request.batches.global_batch == asked.batches.global_batch
        return [change.words for change in changes]

    return search


@pytest.fixture
def peak(model, planner):
    return lambda ds_json, *flags: planner.plan(request(model, RANKS, ds_json, *FLAGS, *flags)).peak


GLOBAL = ("--global_batch_size", 4 * RANKS)
CHECKPOINTING = ("--activation_checkpointing", "full")


def test_checkpointing_comes_first(nearest, peak):
    budget = peak(template(3), *CHECKPOINTING)
    assert nearest(budget, template(3)) == ["--activation_checkpointing full"]


def test_then_the_largest_micro_batch_that_fits(nearest, peak):
    budget = peak(template(3), *CHECKPOINTING, "--per_device_train_batch_size", 2, *GLOBAL)
    assert nearest(budget, template(3), *CHECKPOINTING) == ["--per_device_train_batch_size 2"]


@pytest.mark.slow
def test_then_tensor_parallel_ranks(nearest, peak):
    rest = (*CHECKPOINTING, "--per_device_train_batch_size", 1)
    budget = peak(template(1), *rest, "--tensor_parallel_size", 2)
    assert nearest(budget, template(1), *rest) == ["--tensor_parallel_size 2"]


def test_tensor_parallel_ranks_stay_within_a_node(model, planner, peak):
    rest = (*CHECKPOINTING, "--per_device_train_batch_size", 1)
    budget = peak(template(1), *rest, "--tensor_parallel_size", 2)
    asked = request(model, RANKS, template(1, **GATHER_LITTLE), *FLAGS, *rest, nodes=RANKS)
    changes, _ = nearest_fit(planner, asked, template(1, **GATHER_LITTLE), round(budget / (1 - RESERVED_FRACTION)) + 1)
    assert [change.words for change in changes] == ['"stage": 3 in zero_optimization']


@pytest.mark.slow
def test_then_zero3(nearest, peak):
    """4 key-value heads let no more than 4 ranks share the model."""
    rest = (*CHECKPOINTING, "--per_device_train_batch_size", 1, "--tensor_parallel_size", 4)
    budget = peak(template(1, stage=3, **GATHER_LITTLE), *rest)
    assert nearest(budget, template(1, **GATHER_LITTLE), *rest) == ['"stage": 3 in zero_optimization']


def test_then_offload_of_the_optimizer_state_and_of_the_weights(nearest, peak):
    """At rank 512 the adapter's state is of the weights' order."""
    rest = (*CHECKPOINTING, "--per_device_train_batch_size", 1, "--tensor_parallel_size", 4, "--r", 512)
    optimizer, weights = ({f"offload_{what}": {"device": "cpu"}} for what in ("optimizer", "param"))
    words = [f'"offload_{what}": {{"device": "cpu"}} in zero_optimization' for what in ("optimizer", "param")]
    assert nearest(peak(template(3, **optimizer), *rest), template(3), *rest) == words[:1]
    assert nearest(peak(template(3, **optimizer, **weights), *rest), template(3), *rest) == words


@pytest.mark.slow
def test_two_changes_where_one_is_not_enough(nearest, peak):
    budget = peak(template(3), *CHECKPOINTING, "--per_device_train_batch_size", 1, *GLOBAL)
    assert nearest(budget, template(3)) == ["--activation_checkpointing full", "--per_device_train_batch_size 1"]


def test_nothing_makes_it_fit(nearest):
    assert nearest(100e6, template(3)) is None


def test_a_part_of_the_device_is_left_to_what_is_no_tensor():
    assert available(80 * 2**30) == 72 * 2**30
