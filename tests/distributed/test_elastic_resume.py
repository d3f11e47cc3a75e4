"""A run that changes its layout in the middle equals the uninterrupted run in one plain process."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from comol_ds.training.commit import damage_of, fault_of
from tests.distributed.elastic_cases import CHANGE, GATE, GLOBAL_BATCH, JOURNEYS, STEPS, Journey, uninterrupted
from tests.distributed.launching import run_deepspeed
from tests.distributed.one_process import TOLERANCE, relative
from tests.distributed.stored_state import stored_tensors
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.distributed
WORKER = Path(__file__).parent / "elastic_worker.py"


@pytest.fixture(scope="module")
def run_leg(tmp_path_factory, extensions) -> Callable[[int, str], Path]:
    """Starts the worker on so many ranks for one leg, or both of the gate; returns the folder of the journeys."""
    folder = tmp_path_factory.mktemp("elastic")
    save_tiny_model(folder / "llama")

    def run(ranks: int, leg: str) -> Path:
        words = [leg, str(folder), str(folder)]
        done = run_deepspeed(ranks, WORKER, words, extensions, timeout=280)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return folder

    return run


@pytest.fixture(scope="module")
def journeys(run_leg) -> Path:
    """Every journey, first legs first."""
    for leg in ("first", "then"):
        for ranks in sorted({getattr(journey, leg).ranks for journey in JOURNEYS}):
            folder = run_leg(ranks, leg)
    return folder


def assert_equals_the_uninterrupted_run(journey: Journey, models: Path) -> None:
    """Losses, norms, learning rates and records of every step; the final weights and the whole optimizer state."""
    folder = models / journey.name
    first, then = (torch.load(folder / f"{leg}.pt") for leg in ("first", "then"))
    expected = uninterrupted(journey, str(models))
    assert first["records"] + then["records"] == expected["records"]
    assert [len(records) for records in expected["records"]] == [GLOBAL_BATCH] * STEPS
    assert first["losses"] + then["losses"] == pytest.approx(expected["losses"], rel=TOLERANCE)
    assert first["norms"] + then["norms"] == pytest.approx(expected["norms"], rel=TOLERANCE)
    assert first["rates"] + then["rates"] == expected["rates"]
    assert then["weights"].keys() == expected["weights"].keys()
    for name, tensor in expected["weights"].items():
        assert relative(then["weights"][name], tensor) <= TOLERANCE, name
    state = stored_tensors(folder / "checkpoints" / f"step_{STEPS}")
    assert state.keys() == expected["state"].keys()
    for name, tensor in expected["state"].items():
        assert state[name].shape == tensor.shape
        assert relative(state[name], tensor) <= TOLERANCE, name


@pytest.mark.slow
def test_data_parallel_stage_3_continues_as_tensor_parallel_stage_1(run_leg):
    assert_equals_the_uninterrupted_run(GATE, folder := run_leg(2, "gate"))
    for step in (CHANGE, STEPS):
        checkpoint = folder / GATE.name / "checkpoints" / f"step_{step}"
        assert fault_of(checkpoint) is None and damage_of(checkpoint) is None
        state = json.loads((checkpoint / "state.json").read_text())
        assert (state["step"], state["data_position"]) == (step, {"samples": step * GLOBAL_BATCH})
    layouts = [(1, 3), (2, 1)]
    for step, (tensor_parallel, stage) in zip((CHANGE, STEPS), layouts, strict=True):
        text = (folder / GATE.name / "checkpoints" / f"step_{step}" / "state.json").read_text()
        identity = json.loads(text)["identity"]
        assert (identity["tensor_parallel"], identity["zero_stage"]) == (tensor_parallel, stage)


@pytest.mark.slow
@pytest.mark.parametrize("journey", JOURNEYS, ids=lambda journey: journey.name)
def test_a_run_continues_on_another_layout(journey, journeys):
    assert_equals_the_uninterrupted_run(journey, journeys)
