"""A resumed run is bit-equal to the uninterrupted one at every ZeRO stage, with dropout, on two ranks."""

from pathlib import Path

import pytest
import torch

from tests.distributed.equality_cases import RESUME_CASES
from tests.distributed.launching import run_deepspeed
from tests.tiny_models import save_tiny_model


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, extensions):
    folder = tmp_path_factory.mktemp("resume")
    save_tiny_model(folder / "llama")
    run = run_deepspeed(2, Path(__file__).parent / "resume_worker.py", [str(folder), str(folder)], extensions)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("case", RESUME_CASES, ids=lambda case: case.name)
def test_resumed_steps_are_bit_equal(case, two_ranks):
    outcome = torch.load(two_ranks / f"{case.name}.pt")
    through, resumed = outcome["through"], outcome["resumed"]
    assert len(resumed["results"]) == case.steps - case.steps // 2
    assert resumed["results"] == through["results"][case.steps // 2 :]
    assert resumed["weights"].keys() == through["weights"].keys()
    assert all(torch.equal(resumed["weights"][name], tensor) for name, tensor in through["weights"].items())
