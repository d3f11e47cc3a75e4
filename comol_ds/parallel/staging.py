"""The base's weights on a node's own disk: copied there once, found there by the loader and by nothing else.

COMOL_STAGE_DIR names the folder. It is no setting of the run: what a run is called, what it records and what its
adapter names as its base stay the model that --model_name_or_path gives, wherever the bytes were read.

A copy is <model>-<hash> below the folder, the hash over path, size and time of change of every file: changed weights
are another copy, and a job that reads one is never disturbed. It is written aside and renamed, so one that is there is
complete; deleting it is the user's, or the site's.
"""

import fcntl
import hashlib
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from comol_ds.errors import UserError
from comol_ds.files import sync
from comol_ds.parallel.groups import node_name
from comol_ds.parallel.weight_files import WeightFiles

VARIABLE = "COMOL_STAGE_DIR"
_COPIERS = 4  # one stream does not fill the line to a parallel file system


def stage_dir() -> Path | None:
    """The folder that COMOL_STAGE_DIR names, the node's variables in it filled in; None: nothing is staged.

    Raises:
        UserError: no absolute path, or one with a variable that this node does not set.
    """
    text = os.environ.get(VARIABLE)
    if not text:
        return None
    path = os.path.expandvars(text)
    if "$" in path or not path.startswith("/"):
        raise UserError(f"{VARIABLE} is {text!r}, on this node {path!r}; name an absolute path")
    return Path(path)


def open_weights(model_path: str) -> WeightFiles:
    """The files of a folder or hub name, or their copies on this node if COMOL_STAGE_DIR is set.

    Raises:
        UserError: there is no finished copy; or as `WeightFiles` and `stage_dir` do.
    """
    weights, folder = WeightFiles(model_path), stage_dir()
    if folder is None:
        return weights
    copy = copy_of(weights, folder)
    if not _is_whole(copy, weights):
        raise UserError(
            f"node {node_name()}: {VARIABLE} {folder} has no copy of the weights of --model_name_or_path {model_path};"
            f" run launch/slurm/stage.py on every node, or unset {VARIABLE}"
        )
    return WeightFiles(str(copy))


def stage(weights: WeightFiles, folder: Path) -> tuple[Path, int]:
    """Copy weights into ``folder``, unless a copy of the same files is there; of two jobs at once one copies.

    Returns:
        The copy, and how many bytes were copied.

    Raises:
        UserError: the disk has no room for it.
        OSError: a file cannot be read or written; nothing half is left.
    """
    copy = copy_of(weights, folder)
    folder.mkdir(exist_ok=True)  # not what it lies in: a disk that is not mounted must not become a folder of another
    # no link is followed: on a disk for everybody it could lead anywhere
    with open(
        folder / f"{copy.name}.lock", "a", opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW)
    ) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go when the process ends, however it ends
        if _is_whole(copy, weights):
            return copy, 0
        partial = copy.with_name(f"{copy.name}.writing")
        for remains in (copy, partial):  # what a cleaner of old files, or a killed process, has left
            if os.path.lexists(remains):
                shutil.rmtree(remains)  # refuses a link
        partial.mkdir()
        try:
            size = _write(weights, partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        partial.rename(copy)
        sync(folder)
    return copy, size


def copy_of(weights: WeightFiles, folder: Path) -> Path:
    """Where these files are copied to."""
    stats = [(file, file.stat()) for file in weights.files]
    facts = [(str(file.absolute()), stat.st_size, stat.st_mtime_ns) for file, stat in stats]
    name = re.sub(r"[^\w.-]", "_", weights.path.absolute().parent.name, flags=re.ASCII)[:100]
    return folder / f"{name}-{hashlib.blake2b(repr(facts).encode(), digest_size=8).hexdigest()}"


def _write(weights: WeightFiles, partial: Path) -> int:
    """Copy every file, through to the disk; returns the bytes."""
    size, free = sum(file.stat().st_size for file in weights.files), shutil.disk_usage(partial.parent).free
    if size > free:
        raise UserError(f"{size:,} bytes are needed and {free:,} free; make room or choose another {VARIABLE}")

    def copy(file: Path) -> None:
        target = _inside(partial, file, weights)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
        sync(target)

    with ThreadPoolExecutor(_COPIERS) as pool:
        list(pool.map(copy, weights.files))
    for written in (partial, *partial.rglob("*/")):
        sync(written)
    return size


def _is_whole(copy: Path, weights: WeightFiles) -> bool:
    targets = [(file, _inside(copy, file, weights)) for file in weights.files]
    return all(target.is_file() and target.stat().st_size == file.stat().st_size for file, target in targets)


def _inside(folder: Path, file: Path, weights: WeightFiles) -> Path:
    return folder / file.relative_to(weights.path.parent)
