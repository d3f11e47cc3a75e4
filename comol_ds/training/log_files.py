"""Logs of one JSON object per line, each with its step: appended to, cut at a resume, searched, in constant memory."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from comol_ds.files import replace_file


def append_json_line(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON object as one line.

    Raises:
        RuntimeError: the disk is full, or cannot be written any more.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise RuntimeError(
            f"{path} cannot be written: {error}; make room and continue with --resume_from_checkpoint"
        ) from error


def keep_until(path: Path, step: int) -> None:
    """Drop the lines of steps after ``step``: a resumed run writes them again. A half-written last line goes too.

    Raises:
        OSError: the disk is full or fails; the log is as it was.
    """
    if path.exists():
        replace_file(path, (line for found, line in _lines(path) if found <= step))


def has_step(path: Path, step: int) -> bool:
    """Whether the log has a line of this step."""
    return path.exists() and any(found == step for found, _ in _lines(path))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Step and bytes of every line, as far as lines are whole."""
    with path.open("rb") as file:
        for line in file:
            try:
                step = json.loads(line)["step"]
            except (ValueError, KeyError, TypeError):
                return
            yield step, line.rstrip(b"\n") + b"\n"
