"""What ZeRO-3 holds and sends: partitions from the start, nothing sent to build them, one gather per decoder layer."""

import json
from pathlib import Path

import pytest

from tests.distributed.launching import run_deepspeed
from tests.tiny_models import FAMILIES, save_tiny_model

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def report(tmp_path_factory, extensions):
    folder = tmp_path_factory.mktemp("zero3")
    save_tiny_model(folder / "llama")
    worker = Path(__file__).parent / "zero3_worker.py"
    run = run_deepspeed(2, worker, [str(folder), str(folder)], extensions)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return json.loads((folder / "report.json").read_text())


def test_the_base_is_built_in_partitions(report):
    held = report["held_after_build"]
    assert len(held) == 1 + 2 * 9 + 2  # embedding; per layer 7 Linears and 2 norms; norm and head
    assert all(whole == 0 for whole, _ in held), "no rank holds a whole parameter"
    assert all(0 <= padding < 2 for _, padding in held), "each of the two ranks holds one half"


def test_loading_and_attaching_the_adapter_send_nothing(report):
    assert set(report["building"].values()) == {0}


def test_adapters_ride_in_their_layers_gather(report):
    """Forward and backward gather the embedding, each layer once, the norm and the head; a layer holds 7 adapters."""
    gathers = 2 * (FAMILIES["llama"].num_hidden_layers + 3)
    assert [step["all_gather_into_tensor"] for step in report["steps"]] == [gathers] * 3
    assert [step["reduce_scatter_tensor"] for step in report["steps"]] == [1] * 3
    # number of tokens before the step, loss before the update, gradient norm
    assert [step["all_reduce"] for step in report["steps"]] == [3] * 3


def test_siblings_read_their_input_once_although_their_parameters_are_partitioned(report):
    """q, k, v and gate, up of every layer: a leaf module's parameters are gathered before the first of them runs."""
    assert [step["shared_reads"] for step in report["steps"]] == [2 * FAMILIES["llama"].num_hidden_layers] * 3
