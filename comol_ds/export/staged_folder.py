"""An output folder that appears whole or not at all, and takes the place of nothing but an earlier export."""

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from comol_ds.errors import UserError, one_line
from comol_ds.files import hidden_beside, remove_or_warn, sync
from comol_ds.output_folder import EXPORT_MARK, files_in, marked_files, refuse_inputs_in, write_mark

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def staged_folder(
    output_dir: Path, overwrite: bool, needed: int = 0, sources: Sequence[str | Path] = ()
) -> Iterator[Path]:
    """A hidden folder beside `output_dir` to write into; it takes that name when the block ends without an error.

    Whatever ends the block early leaves nothing behind and an existing `output_dir` as it was. A killed process leaves
    the hidden folder, which the next call removes. The folder's mark, `.comol_export`, names the files in it.

    Args:
        output_dir: where the files shall stand; its parents are created.
        overwrite: replace an earlier export, if the folder holds nothing else. An empty one may always be there.
        needed: bytes that will be written, where that is known.
        sources: files, folders and hub names that are read meanwhile.

    Raises:
        UserError: `output_dir` exists and may not be replaced, or the disk is too small, full or not writable.
    """
    output_dir = output_dir.resolve()
    refuse_inputs_in(sources, [output_dir])
    _refuse_existing(output_dir, overwrite)
    existing = next(path for path in output_dir.parents if path.exists())
    if shutil.disk_usage(existing).free < needed:
        raise UserError(_too_full(output_dir, existing, needed))
    staging = hidden_beside(output_dir, "writing")
    try:
        staging.mkdir(parents=True)
        yield staging
        write_mark(staging, EXPORT_MARK, set(files_in(staging)) - {EXPORT_MARK})
        sync(staging)
        _put_in_place(staging, output_dir)
    except OSError as error:
        if error.errno in _FULL:
            raise UserError(_too_full(output_dir, existing, needed)) from error
        raise UserError(f"{output_dir} cannot be written: {error}; choose another --output_dir") from error
    except SafetensorError as error:  # what save_file says of a disk that is full or fails
        raise UserError(f"{output_dir} cannot be written: {one_line(error)}; choose another --output_dir") from error
    finally:
        if os.path.lexists(staging):
            remove_or_warn(staging)


def _refuse_existing(output_dir: Path, overwrite: bool) -> None:
    if output_dir.is_file():
        raise UserError(f"{output_dir} is a file; --output_dir names a folder")
    if not output_dir.exists() or not any(output_dir.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{output_dir} exists; choose another --output_dir or add --overwrite_output_dir")
    ours = marked_files(output_dir, EXPORT_MARK)
    if ours is None:
        raise UserError(
            f"{output_dir} has no {EXPORT_MARK}, the mark of an earlier export, and would be deleted with all that is"
            " in it; choose another --output_dir or empty it yourself"
        )
    if others := sorted(set(files_in(output_dir)) - ours - {EXPORT_MARK}):
        raise UserError(
            f"{output_dir / others[0]} ({len(others)} such) came into the export later and would be deleted with it;"
            " move it elsewhere or choose another --output_dir"
        )


def _put_in_place(staging: Path, output_dir: Path) -> None:
    replaced = hidden_beside(output_dir, "replaced")
    if output_dir.exists():
        output_dir.rename(replaced)
    staging.rename(output_dir)
    sync(output_dir.parent)
    remove_or_warn(replaced)


def _too_full(output_dir: Path, existing: Path, needed: int) -> str:
    free = shutil.disk_usage(existing).free
    return (
        f"{output_dir} cannot be written: it takes {needed / 2**30:.2f} GiB and {free / 2**30:.2f} are free there;"
        " free some space or choose another --output_dir"
    )
