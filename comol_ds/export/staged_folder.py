"""An output folder that appears whole or not at all."""

import errno
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from comol_ds.adapters.adapter_folder import CONFIG_FILE, sync
from comol_ds.errors import UserError, one_line

_FULL = (errno.ENOSPC, errno.EDQUOT)
_MARKS = ("config.json", CONFIG_FILE)  # of what an earlier export wrote


@contextmanager
def staged_folder(output_dir: Path, overwrite: bool, needed: int = 0, sources: Sequence[Path] = ()) -> Iterator[Path]:
    """A hidden folder beside `output_dir` to write into; it takes that name when the block ends without an error.

    Whatever ends the block early leaves nothing behind and an existing `output_dir` as it was. A killed process leaves
    the hidden folder, which the next call removes.

    Args:
        output_dir: where the files shall stand; its parents are created.
        overwrite: replace an existing folder, with all that is in it. An empty one may always be there.
        needed: bytes that will be written, where that is known.
        sources: what is read meanwhile.

    Raises:
        UserError: `output_dir` exists and may not be replaced, or the disk is too small, full or not writable.
    """
    output_dir = output_dir.resolve()
    for source in sources:
        if output_dir in (source.resolve(), *source.resolve().parents):
            raise UserError(f"{output_dir} holds {source}, which is read; choose another --output_dir")
    _refuse_existing(output_dir, overwrite)
    existing = next(path for path in output_dir.parents if path.exists())
    if shutil.disk_usage(existing).free < needed:
        raise UserError(_too_full(output_dir, existing, needed))
    staging = output_dir.parent / f".{output_dir.name}.writing"
    try:
        shutil.rmtree(staging, ignore_errors=True)  # left by a process that was killed
        staging.mkdir(parents=True)
        yield staging
        sync(staging)
        _put_in_place(staging, output_dir)
    except OSError as error:
        if error.errno in _FULL:
            raise UserError(_too_full(output_dir, existing, needed)) from error
        raise UserError(f"{output_dir} cannot be written: {error}; choose another --output_dir") from error
    except SafetensorError as error:  # what save_file says of a disk that is full or fails
        raise UserError(f"{output_dir} cannot be written: {one_line(error)}; choose another --output_dir") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _refuse_existing(output_dir: Path, overwrite: bool) -> None:
    if output_dir.is_file():
        raise UserError(f"{output_dir} is a file; --output_dir names a folder")
    if not output_dir.exists() or not any(output_dir.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{output_dir} exists; choose another --output_dir or add --overwrite_output_dir")
    if not any((output_dir / name).is_file() for name in _MARKS):
        raise UserError(
            f"{output_dir} holds neither a model nor an adapter and would be deleted with all that is in it;"
            " choose another --output_dir or empty it yourself"
        )


def _put_in_place(staging: Path, output_dir: Path) -> None:
    replaced = staging.with_name(f".{output_dir.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if output_dir.exists():
        output_dir.rename(replaced)
    staging.rename(output_dir)
    sync(output_dir.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _too_full(output_dir: Path, existing: Path, needed: int) -> str:
    free = shutil.disk_usage(existing).free
    return (
        f"{output_dir} cannot be written: it takes {needed / 2**30:.2f} GiB and {free / 2**30:.2f} are free there;"
        " free some space or choose another --output_dir"
    )
