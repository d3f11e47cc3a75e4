"""Committed checkpoints with any content; no engine."""

from collections.abc import Callable
from pathlib import Path

from comol_ds.training.commit import Committer, Target, write_part
from comol_ds.training.generation import Generation, claim_generation


def claimed(checkpoints: Path) -> Generation:
    """A new claim on the folder that holds the checkpoints."""
    return claim_generation(checkpoints.parent / "generations")


def text_writers(files: dict[str, str]) -> dict[str, Callable[[Path], None]]:
    return {name: lambda path, content=content: path.write_text(content) for name, content in files.items()}


def commit_files(
    checkpoints: Path, step: int, *parts: dict[str, str], keep: int | None = None, claim: Generation | None = None
) -> Path:
    """A committed checkpoint of one part per rank, each file name -> content; returns its folder."""
    claim = claim or claimed(checkpoints)
    target = Target(checkpoints, step, claim.number)
    for rank, files in enumerate(parts):
        write_part(target, rank, text_writers(files))
    Committer(len(parts), claim, keep, wait_seconds=1).commit(target)
    return target.path
