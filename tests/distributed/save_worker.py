"""One rank of the test of saves that go wrong: the writer of checkpoints with files of text, no model.

Usage: deepspeed save_worker.py OUTPUT_FOLDER; each rank writes what every case raised on it, and how long it took.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from comol_ds.parallel import groups
from comol_ds.training import checkpoint
from comol_ds.training.checkpoint import CheckpointWriter
from comol_ds.training.generation import claim_generation
from comol_ds.training.identity import RunIdentity

IDENTITY = RunIdentity(2, 1, 3, False, 8, 4, 7, "sgd", "m", {}, {})
WAIT_SECONDS = 4
Write = Callable[[Path], Any]


def works(path: Path) -> None:
    path.write_text("x" * 100)


def full(path: Path) -> None:
    path.write_text("x" * 50)
    raise OSError(28, "No space left on device", str(path))


def stuck(path: Path) -> None:
    time.sleep(3 * WAIT_SECONDS)
    works(path)


def slow(path: Path) -> None:
    time.sleep(1)
    works(path)


def save(writer: CheckpointWriter, rank: int, step: int, writes: list[Write]) -> None:
    """Start to save a step; each rank's file is written by its own function."""
    checkpoint._take = lambda *args: {f"part_{rank}": writes[rank]}
    writer.save(None, step)


# case -> what writes step 2 on each rank
CASES = {
    "works": [works, works],
    "full disk": [works, full],
    "full disk on rank 0": [full, works],
    "stuck": [works, stuck],
    "overtaken": [works, works],
    "ended by an error elsewhere": [slow, slow],
}


def main() -> None:
    output = Path(sys.argv[-1])
    world = groups.read_world()
    groups.initialize(world, timeout_minutes=1)
    reports = {}
    for case, writes in CASES.items():
        folder = output / case.replace(" ", "_")
        writer = CheckpointWriter(
            folder / "checkpoints", folder / "generations", IDENTITY, world, None, wait_seconds=WAIT_SECONDS
        )
        save(writer, world.rank, 1, [works, works])
        writer.finish()
        if case == "overtaken" and world.rank == 0:
            claim_generation(folder / "generations")
        groups.barrier("start the case")
        start = time.monotonic()
        try:
            save(writer, world.rank, 2, writes)
            started = time.monotonic() - start
            if case == "ended by an error elsewhere":
                writer.land()
            else:
                writer.finish()
            raised = None
        except RuntimeError as error:
            raised = f"{type(error).__name__}: {error}"
        reports[case] = {"raised": raised, "started": started, "seconds": time.monotonic() - start}
    (output / f"rank_{world.rank}.json").write_text(json.dumps(reports))
    groups.shut_down()


if __name__ == "__main__":
    main()
    groups.exit_process(0)
