"""Which weights ZeRO-3 gathers when, how many ranks hold them, and what of it a rank keeps."""

import pytest

from comol_ds.planner.communication import Traffic
from comol_ds.planner.plan import Plan, Planner
from tests.planner.geometries import LLAMA_SMALL, request, save_config, template

RANKS, LAYERS = 8, LLAMA_SMALL.num_hidden_layers
NOTHING = {f"stage3_{name}": 0 for name in ("prefetch_bucket_size", "max_live_parameters", "max_reuse_distance")}
FLAGS = ("--per_device_train_batch_size", 1, "--max_length", 256, "--activation_checkpointing", "full")


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    planner, model = Planner(), save_config(LLAMA_SMALL, tmp_path_factory.mktemp("model"))

    def call(ds_json: dict, *flags, ranks: int = RANKS, nodes: int = 1) -> Plan:
        return planner.plan(request(model, ranks, ds_json, *FLAGS, *flags, nodes=nodes))

    return call


def gathers(plan: Plan) -> Traffic | None:
    return next((traffic for traffic in plan.traffic if traffic.kind.startswith("ZeRO-3")), None)


def test_without_room_every_layer_is_gathered_for_each_pass(plan):
    """Embedding, layers, norm and head; a layer arrives in one buffer, out of which its weights are copied."""
    planned = plan(template(3, **NOTHING))
    weights = planned.everything * 2  # bytes
    assert (gathers(planned).collectives, gathers(planned).nbytes) == (2 * (LAYERS + 3), 2 * weights)
    layer = 2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 5632 + 2 * 2048
    adapter = planned.trainable // LAYERS
    assert planned.gathering.computing == pytest.approx(max((layer + adapter) * 2, 32000 * 2048 * 2))
    assert planned.gathering.arriving == 2 * (layer + adapter) * 2


def test_with_room_for_all_they_are_gathered_once(plan):
    everywhere = dict.fromkeys(NOTHING, 10**12)
    planned = plan(template(3, **everywhere))
    assert (gathers(planned).collectives, gathers(planned).nbytes) == (1, planned.everything * 2)


def test_every_micro_batch_gathers_anew(plan):
    once, thrice = (plan(template(3), "--global_batch_size", RANKS * number) for number in (1, 3))
    assert gathers(thrice).collectives == 3 * gathers(once).collectives
    assert gathers(thrice).sent == 3 * gathers(once).sent


def test_weights_below_the_threshold_stay_gathered(plan):
    small = 2048  # norms, and of the adapters cores and routers
    planned, all_partitioned = (
        plan(template(3, **NOTHING, stage3_param_persistence_threshold=small)),
        plan(template(3, **NOTHING)),
    )
    norms = (2 * LAYERS + 1) * 2048 * 2
    assert planned.held.frozen["none"] == all_partitioned.held.frozen["none"] + norms
    persistent = planned.held.adapter["none"] - all_partitioned.held.adapter["none"] + norms
    assert gathers(planned).nbytes == gathers(all_partitioned).nbytes - 2 * persistent


def test_slices_are_partitioned_over_data_parallel_ranks(plan):
    one, two = plan(template(3, **NOTHING)), plan(template(3, **NOTHING), "--tensor_parallel_size", 2)
    assert two.held.frozen["none"] == pytest.approx(one.held.frozen["none"], rel=1e-3)
    assert gathers(two).nbytes == pytest.approx(gathers(one).nbytes / 2, rel=0.01)
    assert gathers(two).sent == pytest.approx(gathers(two).nbytes * 3 / 4, rel=1e-3)


def test_one_data_parallel_rank_gathers_nothing(plan):
    planned = plan(template(3), "--tensor_parallel_size", 4, ranks=4)
    assert gathers(planned) is None
    assert (planned.gathering.computing, planned.gathering.arriving) == (0, 0)


def test_hpz_holds_a_second_copy_and_gathers_within_the_node(plan):
    plain, second = (
        plan(template(3, **NOTHING), nodes=4),
        plan(template(3, **NOTHING, zero_hpz_partition_size=2), nodes=4),
    )
    weights = (plain.everything - plain.trainable) * 2
    assert second.held.frozen["none"] == pytest.approx(weights / 8 + weights / 2, rel=1e-3)
    assert gathers(second).sent == pytest.approx(gathers(second).nbytes / 2, rel=1e-3)
