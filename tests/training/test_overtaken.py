"""A run whose folder another process has claimed since writes no line into its logs."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from comol_ds.parallel.groups import World
from comol_ds.training import loop
from comol_ds.training.checkpoint import CheckpointWriter
from comol_ds.training.generation import Overtaken, claim_generation


class Log:
    """In place of metrics and router statistics: notes what is written."""

    def __init__(self) -> None:
        self.written: list[int] = []

    def log(self, step: int, rate: float) -> dict[str, float]:
        self.written.append(step)
        return {"loss": 1.0, "tokens_per_second": 1.0}

    def write(self, step: int) -> list[str]:
        self.written.append(step)
        return []

    def is_due(self, step: int, last: int) -> bool:
        return step % 2 == 0


def run_of(folder: Path, log: Log) -> SimpleNamespace:
    """A run of 9 steps that logs metrics after every third."""
    world = World(0, 1, 0)
    settings = SimpleNamespace(logging_steps=3)
    return SimpleNamespace(
        total_steps=9, metrics=log, router_log=log, engine=SimpleNamespace(get_lr=lambda: [0.1]),
        plan=SimpleNamespace(world=world, config=SimpleNamespace(run=settings)),
        checkpoints=CheckpointWriter(folder / "checkpoints", folder / "generations", None, world, None, 1.0),
    )  # fmt: skip


@pytest.mark.parametrize(("step", "lines"), [(2, 1), (3, 1), (6, 2), (9, 1), (5, 0)])
def test_lines_that_are_due_are_written_by_the_owner_of_the_folder_alone(tmp_path, step, lines):
    log, bar = Log(), SimpleNamespace(set_postfix_str=lambda text: None)
    run = run_of(tmp_path, log)
    loop.log_step(run, step, bar, stops=False)
    assert log.written == [step] * lines
    claim_generation(tmp_path / "generations")
    if lines:
        with pytest.raises(Overtaken, match="writes nothing more there and stops"):
            loop.log_step(run, step, bar, stops=False)
    assert log.written == [step] * lines
