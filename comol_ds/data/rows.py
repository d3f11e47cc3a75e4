"""Rows of data files and folders, one after the other, with the place of each for messages.

JSON is read here, line by line, and not by datasets' own loader: a broken line is reported with its number, a column
keeps the type it has in the file (Arrow's JSON reader turns a column of "2024-05-01" into timestamps), and rows may
have different keys.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from pyarrow import parquet

from comol_ds.errors import UserError, one_line
from comol_ds.text_files import parse_json

SUFFIXES = (".json", ".jsonl", ".parquet")
# In bytes of a line. 10 million tokens, the longest context that a model of today has, are about 40 MB of text.
_LONGEST_RECORD = 64 * 2**20
_TOO_LONG = "it is longer than 64 MiB, which no model reads at once; split it into records"


def is_saved(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` has written this folder."""
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def without_nulls(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows out of Arrow, without the nulls inside of their columns.

    All rows of a column have one type there, so a turn, a tool or an argument has the keys of all others, null where it
    has none itself.
    """
    for row in rows:
        yield {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def file_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and content of every row of a file, or of a folder that `Dataset.save_to_disk` has written.

    Raises:
        UserError: unreadable or broken, with the line.
    """
    readers = {".parquet": _parquet_rows, ".json": _json_rows}
    read = _saved_rows if path.is_dir() else readers.get(path.suffix, _json_line_rows)
    try:
        for number, row in read(path):
            if not isinstance(row, dict):
                raise UserError(f"{path} row {number}: {type(row).__name__}, expected a JSON object per record")
            if any(isinstance(value, str) and len(value) > _LONGEST_RECORD for value in row.values()):
                raise UserError(f"{path} row {number}: {_TOO_LONG}")
            yield number, row
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the file") from error


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """A .json file is one list of records, or one record per line."""
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    yield from _json_list_rows(path) if start == b"[" else _json_line_rows(path)


def _json_line_rows(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST_RECORD + 1), b""), start=1):
            where = f"{path} line {number}"
            if len(line) > _LONGEST_RECORD:
                raise UserError(f"{where}: {_TOO_LONG}")
            if not line.strip():
                continue
            try:
                row = parse_json(line.decode("utf-8-sig"))
            except ValueError as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                reason = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else reason
                start = line[:60].decode("utf-8", "replace").strip()
                raise UserError(
                    f"{where}: broken JSON ({reason}) in {start!r}; "
                    "write one JSON object per line, or a list of objects in a .json file"
                ) from error
            if _may_hold_surrogates(line):
                _check_text(row, where)
            yield number, row


def _json_list_rows(path: Path) -> Iterator[tuple[int, Any]]:
    content = path.read_bytes()
    try:
        rows = parse_json(content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {error.lineno}: broken JSON ({error.msg}); repair the file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); convert the file to UTF-8") from error
    except ValueError as error:
        raise UserError(f"{path}: broken JSON ({error}); repair the file") from error
    suspicious = _may_hold_surrogates(content)
    for number, row in enumerate(rows, start=1):
        if suspicious:
            _check_text(row, f"{path} row {number}")
        yield number, row


def _may_hold_surrogates(content: bytes) -> bool:
    """Whether JSON holds an escape in which half of a character beyond U+FFFF could be written."""
    return b"\\ud" in content or b"\\uD" in content


def _check_text(row: Any, where: str) -> None:
    """Refuse half of a surrogate pair anywhere in a row: it is no character, and no tokenizer takes it."""
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise UserError(
            f"{where}: {half} is half of a surrogate pair, which is no character; repair what wrote the file, or"
            " remove it"
        ) from error


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        file = parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: not a readable Parquet file; write it again") from error
    batches = file.iter_batches(batch_size=1000)
    yield from enumerate(without_nulls(row for batch in batches for row in batch.to_pylist()), start=1)


def _saved_rows(folder: Path) -> Iterator[tuple[int, Any]]:
    try:
        rows = datasets.load_from_disk(str(folder))
    except Exception as error:  # from JSON, Arrow and datasets itself, without a common base
        raise UserError(
            f"{folder}: not a readable folder of Dataset.save_to_disk ({one_line(error, limit=200)}); write it again"
        ) from error
    yield from enumerate(without_nulls(rows), start=1)
