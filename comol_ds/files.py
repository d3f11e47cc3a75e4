"""Files on the disk: new or whole, never written through a link, never deleted behind one.

A name may be a hard or a symbolic link to somebody else's file: a copy made with `cp -al`, weights that an export
shares with its base. Whoever opens such a name for writing changes the other file too. So a new file is created
exclusively, and one that takes an older one's place is written beside it and renamed.
"""

import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

_MOST_LEFT = 100  # folders beside one that nobody can delete


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_new(path: Path, text: str) -> None:
    """Write a file that must not exist.

    Raises:
        FileExistsError: it does; nothing is written.
    """
    with path.open("x", encoding="utf-8") as file:
        file.write(text)


def copy_new(source: Path, target: Path) -> None:
    """Copy a file's bytes to a name that must not exist.

    Raises:
        FileExistsError: it does; nothing is written.
    """
    target.touch(exist_ok=False)
    shutil.copyfile(source, target)


def replace_file(path: Path, parts: Iterable[str | bytes]) -> None:
    """Write a file that is whole or as it was before, through to the disk, part by part in constant memory.

    Raises:
        OSError: the disk is full or fails; an older file is untouched.
    """
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)  # left by a process that was killed
    try:
        with partial.open("xb") as file:
            for part in parts:
                file.write(part.encode() if isinstance(part, str) else part)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    partial.rename(path)
    sync(path.parent)


def remove(path: Path) -> None:
    """Delete a file, or all that can be deleted of a folder. Of a symbolic link the link goes, its target stays.

    Raises:
        OSError: naming a file that is still there, and why.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    shutil.rmtree(path, ignore_errors=True)
    if path.exists():
        try:
            shutil.rmtree(path)
        except OSError as error:
            left = next((file for file in path.rglob("*") if not file.is_dir()), path)
            raise OSError(error.errno, error.strerror, str(left)) from error


def remove_or_warn(path: Path) -> bool:
    """`remove` where nothing depends on it: what cannot be deleted is named on stderr. Whether it is gone."""
    try:
        remove(path)
    except OSError as error:
        print(
            f"warning: {error.filename} cannot be deleted: {error.strerror}; delete {path} yourself",
            file=sys.stderr,
            flush=True,
        )
        return False
    return True


def hidden_beside(folder: Path, use: str) -> Path:
    """A free hidden name beside ``folder``; what a killed process has left under it is deleted.

    Where no name can be used at all, such as one beside a file's content or one that is too long, whoever makes it is
    told why.
    """
    for number in range(1, _MOST_LEFT + 1):
        found = folder.parent / f".{folder.name}.{use}{'' if number == 1 else f'-{number}'}"
        if not os.path.lexists(found) or remove_or_warn(found):
            break
    return found
