"""Whose an output folder is: marks that only this package writes, and what must not lie where a command deletes."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from comol_ds.errors import UserError
from comol_ds.files import replace_file

RUN_MARK = ".comol_run"
EXPORT_MARK = ".comol_export"


def write_mark(folder: Path, mark: str, files: Iterable[str] = ()) -> None:
    """Say that a folder is ours, and which files in it are, if not every one that a run writes."""
    replace_file(folder / mark, [json.dumps({"written_by": "comol_ds", "files": sorted(files)}) + "\n"])


def marked_files(folder: Path, mark: str) -> set[str] | None:
    """The files that the mark names; None if there is no mark of ours."""
    try:
        content = json.loads((folder / mark).read_text(encoding="utf-8"))
        return set(content["files"]) if content["written_by"] == "comol_ds" else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def files_in(folder: Path) -> Iterator[str]:
    """Every name below a folder that is no folder itself; symbolic links are not followed."""
    for path, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(path, name))]
        yield from (os.path.relpath(os.path.join(path, name), folder) for name in (*files, *links))


def is_taken(path: Path) -> bool:
    """Whether something would be lost if this name were written: a file with content, a folder that is not empty."""
    if path.is_dir():
        return any(path.iterdir())
    return path.exists() and path.stat().st_size > 0


def refuse_inputs_in(inputs: Iterable[str | Path], replaced: Iterable[Path]) -> None:
    """Refuse to delete or overwrite what is read. To be asked before anything is deleted, and before weights load.

    Args:
        inputs: files, folders, or hub names, which lie nowhere here.
        replaced: files and folders that will be deleted or written over.

    Raises:
        UserError: an input is one of them or lies in one, itself or by a symbolic link.
    """
    places = [(path, path.resolve()) for path in replaced]
    for source in inputs:
        for real in _real_paths(Path(source).expanduser()):
            for path, place in places:
                if place in (real, *real.parents):
                    raise UserError(f"{path} holds {source}, which is read; choose another --output_dir")


def _real_paths(source: Path) -> Iterator[Path]:
    """Where an input lies: by its name, behind its links, and behind the links in it (hub snapshots)."""
    if not source.exists():
        return
    yield source.absolute()
    yield source.resolve()
    if source.is_dir():
        yield from (path.resolve() for path in source.iterdir() if path.is_symlink())
