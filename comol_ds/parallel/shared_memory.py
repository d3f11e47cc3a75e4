"""DeepSpeed's buffers in shared memory, 69 MB per rank and port: it never deletes them, and enough runs would fill it.

A run deletes its own when it ends; what a killed run has left, the next run on this machine does.
"""

import os
import re
import time
from contextlib import suppress
from pathlib import Path

_FOLDER = Path("/dev/shm")
_NAME = re.compile(r"deepspeed_.+_(?P<port>\d+)_(?P<rank>\d+)")
_SETTLED_SECONDS = 10.0  # from a file's creation until every rank on this machine has surely mapped it


def remove_own_buffers(port: int, rank: int) -> None:
    """Delete the buffers of this rank of this run."""
    for file, name in _buffers():
        if (int(name["port"]), int(name["rank"])) == (port, rank):
            file.unlink(missing_ok=True)


def remove_abandoned_buffers() -> list[Path]:
    """Delete this user's buffers that no living process has mapped, and return them.

    Another user's are left alone. A file is known by device and inode: a container may see it under another path.
    """
    now, candidates = time.time(), {}
    for file, _ in _buffers():
        with suppress(FileNotFoundError):  # its run ended meanwhile
            found = file.stat()
            if found.st_uid == os.geteuid() and now - found.st_mtime > _SETTLED_SECONDS:
                device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}"
                candidates[device, str(found.st_ino)] = file
    if not candidates:
        return []
    mapped = _mapped_files()
    abandoned = [file for key, file in candidates.items() if key not in mapped]
    for file in abandoned:
        file.unlink(missing_ok=True)
    return abandoned


def _buffers() -> list[tuple[Path, re.Match]]:
    return [(file, name) for file in _FOLDER.glob("deepspeed_*") if (name := _NAME.fullmatch(file.name))]


def _mapped_files() -> set[tuple[str, str]]:
    """(device, inode) of what every process has mapped, but for those of other users, which cannot open our buffers."""
    mapped = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # another user's, or ended meanwhile
            lines = (process / "maps").read_text().splitlines()
            # address, rights, offset, device, inode, path
            mapped |= {(words[3], words[4]) for line in lines if len(words := line.split(maxsplit=5)) == 6}
    return mapped
