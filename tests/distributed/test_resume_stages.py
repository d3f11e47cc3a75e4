"""A resumed run is bit-equal to the uninterrupted one at every ZeRO stage, with dropout, and under TP2 x DP2."""

from pathlib import Path

import pytest
import torch

from tests.distributed.equality_cases import RESUME_CASES, TP_RESUME_CASES
from tests.distributed.launching import run_deepspeed
from tests.tiny_models import save_tiny_model


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory, extensions):
    """Ranks -> folder with that world's cases, trained once."""
    folders = {}

    def train(ranks: int) -> Path:
        if ranks not in folders:
            folders[ranks] = folder = tmp_path_factory.mktemp(f"resume{ranks}")
            save_tiny_model(folder / "llama")
            worker = Path(__file__).parent / "resume_worker.py"
            run = run_deepspeed(ranks, worker, [str(folder), str(folder)], extensions)
            assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
        return folders[ranks]

    return train


RUNS = [
    *(pytest.param(2, case, id=f"2-{case.name}") for case in RESUME_CASES),
    *(pytest.param(4, case, id=f"4-{case.name}") for case in TP_RESUME_CASES),
]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "case"), RUNS)
def test_resumed_steps_are_bit_equal(ranks, case, folder_of):
    outcome = torch.load(folder_of(ranks) / f"{case.name}.pt")
    through, resumed = outcome["through"], outcome["resumed"]
    assert len(resumed["results"]) == case.steps - case.steps // 2
    assert resumed["results"] == through["results"][case.steps // 2 :]
    assert resumed["weights"].keys() == through["weights"].keys()
    assert all(torch.equal(resumed["weights"][name], tensor) for name, tensor in through["weights"].items())
