"""Llama-3.1-70B geometry: planned in seconds, without its memory, and with the figures that arithmetic gives."""

import json
import os
import subprocess
import sys

import pytest

from comol_ds.adapters.comol_layer import comol_table
from comol_ds.adapters.table import count_over_linears
from tests.planner.geometries import LLAMA_70B, REPOSITORY, save_config

HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY, KEYS = 8192, 28672, 80, 128256, 1024
RANKS, TOKENS, GIB = 8, 4096, 2**30
FROZEN = (
    VOCABULARY * HIDDEN * 2
    + HIDDEN
    + LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * KEYS + 3 * HIDDEN * INTERMEDIATE + 2 * HIDDEN)
)
LINEARS = [(HIDDEN, HIDDEN), (HIDDEN, KEYS), (HIDDEN, KEYS), (HIDDEN, HIDDEN), (INTERMEDIATE, HIDDEN)]  # q k v o down


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """(the report, seconds of CPU, bytes of memory) of the command."""
    model = save_config(LLAMA_70B, tmp_path_factory.mktemp("model"))
    command = [
        sys.executable, "launch/plan.py", "--json", "--model_name_or_path", model, "--world_size", str(RANKS),
        "--ds_config", "ds_configs/zero3.json", "--per_device_train_batch_size", "1", "--max_length", str(TOKENS),
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return json.loads(output), usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def test_under_ten_seconds_and_two_gigabytes(planned):
    """Seconds of the processor, not of the clock: other processes slow the clock only."""
    _, seconds, nbytes = planned
    assert seconds < 10
    assert nbytes < 2e9


def test_parameters_are_the_published_ones(planned):
    parameters = planned[0]["parameters"]
    assert parameters["frozen"] == FROZEN
    assert parameters["trainable"] == LAYERS * count_over_linears(comol_table(), LINEARS, r=16, num_experts=8)
    assert round(parameters["trainable"] / 1e6, 2) == 113.59


def test_weights_and_optimizer_state_follow_from_the_parameters(planned):
    report, *_ = planned
    device, trainable = report["device_bytes"], report["parameters"]["trainable"]
    assert device["frozen_weights"] == pytest.approx(FROZEN * 2 / RANKS, rel=1e-6)
    assert device["adapter"] == pytest.approx(trainable * 2 / RANKS, rel=1e-6)
    assert device["optimizer_master"] == pytest.approx(trainable * 4 / RANKS, rel=1e-6)
    assert device["optimizer_moments"] == pytest.approx(trainable * 8 / RANKS, rel=1e-6)


def test_terms_add_up_to_the_peak(planned):
    device = planned[0]["device_bytes"]
    terms = [nbytes for name, nbytes in device.items() if name not in ("peak", "update_temporaries")]
    assert sum(terms) == device["peak"]


def test_full_checkpointing_keeps_the_input_of_every_layer(planned):
    """And final norm (its input in fp32, its factor, the head's input) and the logits."""
    saved = planned[0]["saved_activations_bytes"]
    inputs = LAYERS * TOKENS * HIDDEN * 2
    ends = TOKENS * (HIDDEN * (4 + 2) + VOCABULARY * 2)
    assert saved["full"] == pytest.approx(inputs + ends, rel=0.01)
    assert saved["none"] > 15 * saved["full"]


def test_every_weight_is_gathered_twice_per_step(planned):
    weights = planned[0]["communication_per_step"][0]
    assert weights["kind"] == "ZeRO-3: weights, forward and backward"
    everything = (FROZEN + planned[0]["parameters"]["trainable"]) * 2
    head = VOCABULARY * HIDDEN * 2  # stays between its forward and its backward pass
    assert weights["nbytes"] == pytest.approx(2 * everything - head, rel=0.001)
    assert weights["sent"] == pytest.approx(weights["nbytes"] * (RANKS - 1) / RANKS, rel=1e-6)


def test_80_gib_are_enough_with_checkpointing_only(planned):
    report, *_ = planned
    assert (report["fits"], report["device_memory_bytes"], report["available_bytes"]) == (False, 80 * GIB, 72 * GIB)
    assert report["nearest_change"]["changes"] == ["--activation_checkpointing full"]
    assert report["nearest_change"]["peak"] < 30 * GIB
