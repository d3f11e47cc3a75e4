"""How a checkpoint becomes one: written aside, synced, verified, renamed, marked. A crash at any instant is harmless.

    step_<n>.writing-<g>/    being written by the run that holds claim g; parts/rank_<r>.json says rank r is done
    step_<n>/                renamed in one operation, once every rank's part is there with its size
    step_<n>/COMMITTED       the manifest, size and checksum of every file; without it the folder is not used
    step_<n>.replaced-<g>/   an unusable step_<n> that made room

Files and folders are flushed to the disk before what relies on them. No rank waits for another here except rank 0,
which looks for the other ranks' parts for a limited time. All ranks see one folder: --output_dir lies on a file system
that they share.
"""

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

from comol_ds.checkpoint_names import MARKER, by_step
from comol_ds.errors import UserError, one_line
from comol_ds.files import remove_or_warn, sync
from comol_ds.tensor_files import listed_file
from comol_ds.text_files import read_json
from comol_ds.training.generation import Generation

STATE = "state.json"  # read before the ranks can divide the checksums among them
_PARTS = "parts"
_LEFTOVER = re.compile(r"step_\d+\.(writing|replaced)-\d+")
_POLL_SECONDS = 0.1

# file name -> {"bytes": size, "blake2b": checksum}
Manifest = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Target:
    """One checkpoint of one run: where it is written and what it will be called."""

    checkpoints: Path
    step: int
    generation: int

    @property
    def name(self) -> str:
        return f"step_{self.step}"

    @property
    def path(self) -> Path:
        return self.checkpoints / self.name

    @property
    def writing(self) -> Path:
        return self.checkpoints / f"{self.name}.writing-{self.generation}"

    @property
    def replaced(self) -> Path:
        return self.checkpoints / f"{self.name}.replaced-{self.generation}"


def write_part(target: Target, rank: int, writers: Mapping[str, Callable[[Path], None]]) -> None:
    """Write this rank's files, flush them, and leave word that they are complete.

    Args:
        target: the checkpoint.
        rank: global rank.
        writers: path below the checkpoint -> what writes a file, or a folder of files, there.

    Raises:
        RuntimeError: a file cannot be written; names the cause and what is still usable.
    """
    try:
        manifest: Manifest = {}
        for name, write in writers.items():
            path = target.writing / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
            for file in _files_at(path):
                sync(file)
                manifest[str(file.relative_to(target.writing))] = {
                    "bytes": file.stat().st_size,
                    "blake2b": _digest(file),
                }
        _write_synced(_part_file(target, rank), {"files": manifest})
    except UserError:
        raise
    except Exception as error:  # torch and safetensors have errors of their own for a full disk
        raise RuntimeError(_explain(error, target)) from error


@dataclass(frozen=True)
class Committer:
    """What rank 0 does with the ranks' parts.

    Attributes:
        ranks: number of parts that make a checkpoint.
        generation: this run's claim on the folder.
        keep: number of committed checkpoints to leave; None: all.
        wait_seconds: longest wait for a part.
        given_up: set when a part will never come.
    """

    ranks: int
    generation: Generation
    keep: int | None
    wait_seconds: float
    given_up: Event = field(default_factory=Event)

    def commit(self, target: Target) -> None:
        """Wait for every rank's part, verify, rename, mark; then delete the oldest checkpoints beyond ``keep``.

        Raises:
            Overtaken: another run owns the folder now; nothing is committed.
            RuntimeError: a part is missing after the time limit or is not what its rank wrote, or the disk fails.
        """
        try:
            manifest = self._wait_for_parts(target)
            _verify(target, manifest)
            remove_or_warn(target.writing / _PARTS)
            for folder in (*target.writing.rglob("*/"), target.writing):
                sync(folder)
            self.generation.check()
            if target.path.exists():
                target.path.rename(target.replaced)
            target.writing.rename(target.path)
            sync(target.checkpoints)
            self.generation.check()
            _write_synced(target.path / MARKER, {"generation": self.generation.number, "files": manifest})
            remove_or_warn(target.replaced)
            delete_oldest(target.checkpoints, self.keep, target.path)
        except OSError as error:
            self.generation.check()  # a run that took over has cleaned up what this one was writing
            raise RuntimeError(_explain(error, target)) from error

    def _wait_for_parts(self, target: Target) -> Manifest:
        end = time.monotonic() + self.wait_seconds
        while missing := [rank for rank in range(self.ranks) if not _part_file(target, rank).exists()]:
            self.generation.check()
            if self.given_up.is_set():
                raise RuntimeError(f"{target.name} is not committed: a rank could not write its part")
            if time.monotonic() > end:
                names = ", ".join(map(str, missing))
                raise RuntimeError(
                    f"{target.name} is not committed: after {self.wait_seconds:.0f} s no part of rank"
                    f"{'s' * (len(missing) > 1)} {names} in {target.writing}; do all ranks see one --output_dir?"
                )
            time.sleep(_POLL_SECONDS)
        parts = [json.loads(_part_file(target, rank).read_text(encoding="utf-8")) for rank in range(self.ranks)]
        return {name: entry for part in parts for name, entry in part["files"].items()}


def fault_of(checkpoint: Path) -> str | None:
    """Why the checkpoint must not be used; None if it is committed and every file has its size.

    Of the contents only that of state.json is compared; `damage_of` reads them all.
    """
    marker = checkpoint / MARKER
    if not marker.exists():
        return f"it has no {MARKER} marker, the save did not finish"
    try:
        manifest = _read_manifest(checkpoint)
        sizes = {name: entry["bytes"] for name, entry in manifest.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {MARKER} marker is damaged"
    for name, size in sizes.items():
        file = checkpoint / name
        found = file.stat().st_size if file.exists() else None
        if found != size:
            return f"{name} is missing" if found is None else f"{name} has {found} of {size} bytes"
    return _difference(checkpoint, STATE, manifest[STATE]) if STATE in manifest else None


def damage_of(checkpoint: Path, share: int = 0, shares: int = 1) -> str | None:
    """The first file whose content is not what was committed, in this share of the files; None if there is none.

    Args:
        checkpoint: without a fault, see `fault_of`.
        share, shares: read every ``shares``-th file of the manifest, from number ``share`` on.
    """
    mine = list(_read_manifest(checkpoint).items())[share::shares]
    return next((found for name, entry in mine if (found := _difference(checkpoint, name, entry))), None)


def remove_leftovers(checkpoints: Path) -> list[str]:
    """Delete what runs that ended inside a save have left, and return the names of what is gone; nothing depends on it.

    Only for who owns the folder. A link is nothing that a save leaves.
    """
    leftovers = [path for path in checkpoints.glob("step_*") if _LEFTOVER.fullmatch(path.name)]
    leftovers += [path for path in by_step(checkpoints) if not (path / MARKER).exists()]
    return sorted(path.name for path in leftovers if not path.is_symlink() and remove_or_warn(path))


def delete_oldest(checkpoints: Path, keep: int | None, newest: Path) -> None:
    """Delete committed checkpoints beyond ``keep``, never ``newest``. What cannot be deleted is warned of and stays."""
    committed = [path for path in by_step(checkpoints) if (path / MARKER).exists()]
    for old in committed[keep:] if keep else []:
        # the marker first: a deletion cut short leaves no half checkpoint that looks whole; of a link only the link
        if old != newest and (old.is_symlink() or remove_or_warn(old / MARKER)):
            remove_or_warn(old)


def _part_file(target: Target, rank: int) -> Path:
    return target.writing / _PARTS / f"rank_{rank}.json"


def _files_at(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _verify(target: Target, manifest: Manifest) -> None:
    """Every file that the ranks have written is there as they have written it, and no other."""
    found = {str(file.relative_to(target.writing)): file.stat().st_size for file in _files_at(target.writing)}
    found = {name: size for name, size in found.items() if not name.startswith(f"{_PARTS}/")}
    expected = {name: entry["bytes"] for name, entry in manifest.items()}
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise RuntimeError(
                f"{target.name} is not committed: {name} has {found.get(name, 'no')} bytes in {target.writing},"
                f" {expected.get(name, 'no')} were written"
            )


def _difference(checkpoint: Path, name: str, entry: dict[str, Any]) -> str | None:
    is_same = _digest(checkpoint / name) == entry.get("blake2b")
    return None if is_same else f"the content of {name} is not what was written"


def _read_manifest(checkpoint: Path) -> Manifest:
    manifest: Manifest = read_json(checkpoint / MARKER)["files"]
    for name in manifest:
        listed_file(checkpoint, name)
    return manifest


def _write_synced(path: Path, content: Any) -> None:
    """A JSON file that is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
    sync(partial)
    partial.rename(path)
    sync(path.parent)


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _explain(error: Exception, target: Target) -> str:
    usable = next((path.name for path in by_step(target.checkpoints) if fault_of(path) is None), None)
    existing = next(path for path in (target.checkpoints, *target.checkpoints.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    state = f"{usable} is untouched, continue it with --resume_from_checkpoint" if usable else "none is committed yet"
    return f"checkpoint {target.path} cannot be written, {free} bytes are free there: {one_line(error)}; {state}"
