"""Folders of a cache: built once, verified whenever they are opened, built again when they are not what was written.

    <key>/                             the content, and manifest.json with the size and checksum of every file
    <key>.lock                         held by the process that builds <key>; the others wait, and find its work
    building-<key>-<host>-<process>/   being built by that process, which holds the lock

The kernel takes a lock back from a process that has died, and lends none to its children, which may outlive it. Where a
file system keeps locks within a machine, two nodes may build the same content at the same time: each in a folder of its
own, and nobody deletes another host's.
"""

import fcntl
import json
import os
import re
import shutil
import socket
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from comol_ds.tensor_files import listed_file
from comol_ds.text_files import read_json

MANIFEST = "manifest.json"
_BUILDING = re.compile(r"building-(?P<key>[0-9a-f]+)-(?P<host>.+)-\d+")


def open_folder(
    root: Path, key: str, build: Callable[[Path, Path], dict[str, Any]], outdated: Callable[[Path], bool]
) -> tuple[Path, dict[str, Any]]:
    """The verified folder of a key, built if there is none or it is damaged, and what its builder said about it.

    Args:
        root: the cache, on a file system with locks; created if missing.
        key: hexadecimal digits that stand for all that decides the content.
        build: (folder to create, folder for what is needed meanwhile) -> JSON values to keep beside the content.
        outdated: whether an existing folder is to be replaced although it may be whole.

    Raises:
        OSError: the cache cannot be read, written or locked.
    """
    folder = root / key
    if _is_usable(folder, outdated):
        return folder, _read_manifest(folder)[1]
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root / f"{key}.lock", f"waiting for another process that builds {folder}"):
        _remove_abandoned(root, key)
        fault = fault_of(folder) if folder.exists() else None
        if fault is not None:
            print(f"{folder} is not what was written ({fault}) and is built again", flush=True)
        if fault is not None or not folder.exists() or outdated(folder):
            _build(root, key, build, outdated)
    return folder, _read_manifest(folder)[1]


def _is_usable(folder: Path, outdated: Callable[[Path], bool]) -> bool:
    return folder.exists() and not outdated(folder) and fault_of(folder) is None


def fault_of(folder: Path) -> str | None:
    """How the folder differs from its manifest; None if every byte is as it was written.

    It costs the reading, and 0.3 s per GB for zlib.crc32 on one core of an AMD EPYC; blake2b would take 1.5 s.
    """
    try:
        listed, _ = _read_manifest(folder)
        entries = {name: (entry["bytes"], entry["crc32"]) for name, entry in listed.items()}
        files = {name: listed_file(folder, name) for name in entries}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is missing or damaged"
    for name, (size, checksum) in entries.items():
        try:
            found = files[name].stat().st_size
            if found != size:
                return f"{name} has {found} of {size} bytes"
            if _crc32(files[name]) != checksum:
                return f"the content of {name} has changed"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


def _build(
    root: Path, key: str, build: Callable[[Path, Path], dict[str, Any]], outdated: Callable[[Path], bool]
) -> None:
    """Build aside, then rename. Only for who holds the lock."""
    folder, building = root / key, root / f"building-{key}-{socket.gethostname()}-{os.getpid()}"
    built, scratch = building / "built", building / "scratch"
    scratch.mkdir(parents=True)
    try:
        facts = build(built, scratch)
        files = {str(file.relative_to(built)): file for file in sorted(built.rglob("*")) if file.is_file()}
        entries = {name: {"bytes": file.stat().st_size, "crc32": _crc32(file)} for name, file in files.items()}
        (built / MANIFEST).write_text(json.dumps({"files": entries, "facts": facts}) + "\n", encoding="utf-8")
        if _is_usable(folder, outdated):  # another node's, which it may be reading
            return
        with suppress(FileNotFoundError):
            folder.rename(building / "replaced")
        built.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _remove_abandoned(root: Path, key: str) -> None:
    """Delete what processes of this host that have died were building: whose lock is ours, or anybody's to take."""
    for building in root.glob("building-*"):
        name = _BUILDING.fullmatch(building.name)
        if name is None or name["host"] != socket.gethostname():
            continue
        if name["key"] == key:
            shutil.rmtree(building, ignore_errors=True)
            continue
        with suppress(OSError), _locked(root / f"{name['key']}.lock"):
            shutil.rmtree(building, ignore_errors=True)


@contextmanager
def _locked(path: Path, waiting: str | None = None) -> Iterator[None]:
    """Hold a lock, with a line if that takes a wait.

    Raises:
        BlockingIOError: another process holds it, and ``waiting`` does not say what for.
    """
    with path.open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is None:
                raise
            print(waiting, flush=True)
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def _read_manifest(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    manifest = read_json(folder / MANIFEST)
    return manifest["files"], manifest["facts"]


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum
