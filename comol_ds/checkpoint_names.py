"""What a run's checkpoints are called, for those who write them and those who look for one.

Other folders may stand beside them: a copy that a user has named, or what an interrupted save has left.
"""

import re
from pathlib import Path

MARKER = "COMMITTED"  # the file without which a checkpoint is not one
_NAME = re.compile(r"step_([0-9]+)")


def step_of(path: Path) -> int | None:
    """n of a path called step_<n>; None for any other."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def by_step(checkpoints: Path) -> list[Path]:
    """All step_<n> folders, committed or not, newest first."""
    steps = [path for path in checkpoints.glob("step_*") if path.is_dir() and step_of(path) is not None]
    return sorted(steps, key=step_of, reverse=True)
