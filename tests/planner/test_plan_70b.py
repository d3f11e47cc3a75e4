"""Llama-3.1-70B geometry: planned without its memory, and with the figures that arithmetic gives."""

import pytest

from comol_ds.adapters.comol_layer import comol_table
from comol_ds.adapters.table import count_over_linears
from comol_ds.benchmark.planning import PlanningCase, plan_once, summary, table

HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY, KEYS = 8192, 28672, 80, 128256, 1024
RANKS, TOKENS, GIB = 8, 4096, 2**30
FROZEN = (
    VOCABULARY * HIDDEN * 2
    + HIDDEN
    + LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * KEYS + 3 * HIDDEN * INTERMEDIATE + 2 * HIDDEN)
)
LINEARS = [(HIDDEN, HIDDEN), (HIDDEN, KEYS), (HIDDEN, KEYS), (HIDDEN, HIDDEN), (INTERMEDIATE, HIDDEN)]  # q k v o down


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return plan_once(PlanningCase(tmp_path_factory.mktemp("model"), RANKS, TOKENS))


@pytest.fixture(scope="module")
def planned(run):
    """The command's report."""
    return run["report"]


def test_under_two_gigabytes(run):
    """The model has 141 GB; `launch/benchmark.py plan` measures the seconds."""
    assert run["memory_bytes"] < 2e9


def test_benchmark_sums_up_its_runs(run, tmp_path):
    result = summary(PlanningCase(tmp_path, RANKS, TOKENS), [run | {"processor": 1.0}, run | {"processor": 3.0}])
    assert result["seconds"]["processor"] == {"median": 2.0, "minimum": 1.0, "maximum": 3.0}
    assert result["planned_peak_bytes"] == run["report"]["device_bytes"]["peak"]
    assert "2 rounds" in table(result) and "processor 2.00 s" in table(result)


def test_parameters_are_the_published_ones(planned):
    parameters = planned["parameters"]
    assert parameters["frozen"] == FROZEN
    assert parameters["trainable"] == LAYERS * count_over_linears(comol_table(), LINEARS, r=16, num_experts=8)
    assert round(parameters["trainable"] / 1e6, 2) == 113.59


def test_weights_and_optimizer_state_follow_from_the_parameters(planned):
    device, trainable = planned["device_bytes"], planned["parameters"]["trainable"]
    assert device["frozen_weights"] == pytest.approx(FROZEN * 2 / RANKS, rel=1e-6)
    assert device["adapter"] == pytest.approx(trainable * 2 / RANKS, rel=1e-6)
    assert device["optimizer_master"] == pytest.approx(trainable * 4 / RANKS, rel=1e-6)
    assert device["optimizer_moments"] == pytest.approx(trainable * 8 / RANKS, rel=1e-6)


def test_terms_add_up_to_the_peak(planned):
    device = planned["device_bytes"]
    terms = [nbytes for name, nbytes in device.items() if name not in ("peak", "update_temporaries")]
    assert sum(terms) == device["peak"]


def test_full_checkpointing_keeps_the_input_of_every_layer(planned):
    """And final norm (its input in fp32, its factor, the head's input) and the logits."""
    saved = planned["saved_activations_bytes"]
    inputs = LAYERS * TOKENS * HIDDEN * 2
    ends = TOKENS * (HIDDEN * (4 + 2) + VOCABULARY * 2)
    assert saved["full"] == pytest.approx(inputs + ends, rel=0.01)
    assert saved["none"] > 15 * saved["full"]


def test_every_weight_is_gathered_twice_per_step(planned):
    weights = planned["communication_per_step"][0]
    assert weights["kind"] == "ZeRO-3: weights, forward and backward"
    everything = (FROZEN + planned["parameters"]["trainable"]) * 2
    head = VOCABULARY * HIDDEN * 2  # stays between its forward and its backward pass
    assert weights["nbytes"] == pytest.approx(2 * everything - head, rel=0.001)
    assert weights["sent"] == pytest.approx(weights["nbytes"] * (RANKS - 1) / RANKS, rel=1e-6)


def test_80_gib_are_enough_with_checkpointing_only(planned):
    assert (planned["fits"], planned["device_memory_bytes"], planned["available_bytes"]) == (False, 80 * GIB, 72 * GIB)
    assert planned["nearest_change"]["changes"] == ["--activation_checkpointing full"]
    assert planned["nearest_change"]["peak"] < 30 * GIB
