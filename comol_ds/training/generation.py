"""Which process owns a run folder: the one that claimed it last.

A job that was requeued may meet its old self: after a network partition the old ranks go on, unaware that others have
taken their place. Every run therefore claims the next number in <run folder>/generations when it starts, and asks for
the newest number before it commits a checkpoint. Creating a file that must not exist is atomic, on NFS too, so two runs
never hold one number.

Between the last question and the commit itself lies a rename. A run that is overtaken in that instant commits a whole
checkpoint of its own, under the name of its step; it never mixes its files with another run's.
"""

import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

_ATTEMPTS = 100


class Overtaken(RuntimeError):
    """Another process has claimed the run folder since."""


@dataclass(frozen=True)
class Generation:
    """A claim on a run folder."""

    folder: Path
    number: int

    def check(self) -> None:
        """Go on only while this claim is the newest.

        Raises:
            Overtaken: naming who has claimed the folder since.
        """
        newest = newest_generation(self.folder)
        if newest == self.number:
            return
        if newest < self.number:
            raise Overtaken(f"{self.folder} no longer holds this run's claim, number {self.number}; the run stops")
        raise Overtaken(
            f"{self.folder.parent} was taken over by {_owner(self.folder / str(newest))} with claim {newest}; this"
            f" process holds claim {self.number}, writes nothing more there and stops"
        )


def claim_generation(folder: Path) -> Generation:
    """Take the next number; whoever held the one before can no longer commit.

    Args:
        folder: the run's generations folder; created if missing.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    claim = {"host": socket.gethostname(), "process": os.getpid(), "time": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    for _ in range(_ATTEMPTS):
        number = newest_generation(folder) + 1
        try:
            with (folder / str(number)).open("x", encoding="utf-8") as file:
                file.write(json.dumps(claim) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError:
            continue  # another run was faster
        return Generation(folder, number)
    raise OSError(f"{folder}: {_ATTEMPTS} other runs claimed a number first")


def newest_generation(folder: Path) -> int:
    """The highest number claimed; 0 if there is none."""
    return max((int(path.name) for path in folder.glob("*") if path.name.isdecimal()), default=0)


def _owner(claim: Path) -> str:
    try:
        values = json.loads(claim.read_text(encoding="utf-8"))
        return f"process {values['process']} on {values['host']} at {values['time']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
