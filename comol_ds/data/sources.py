"""Where records come from: files, folders and hub names, checked early and read row by row.

JSON is read here, line by line, and not by datasets' own loader: a broken line is reported with its number, a column
keeps the type it has in the file (Arrow's JSON reader turns a column of "2024-05-01" into timestamps), and rows may
have different keys.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from pyarrow import parquet

from comol_ds.data.formats import detect_format, to_text
from comol_ds.errors import UserError, one_line
from comol_ds.text_files import parse_json

SUFFIXES = (".json", ".jsonl", ".parquet")
# In bytes of a line. 10 million tokens, the longest context that a model of today has, are about 40 MB of text.
_LONGEST_RECORD = 64 * 2**20
_TOO_LONG = "it is longer than 64 MiB, which no model reads at once; split it into records"
# How file names spell the splits; a folder is read by these words.
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
TEXT_FEATURES = datasets.Features(
    {name: datasets.Value("string") for name in ("record_id", "task", "prompt", "completion", "conversation")}
)


@dataclass(frozen=True)
class Source:
    """One file, or one split of a hub data set.

    `name` labels its records ("<name>:<row number>"), `task` is their task when a row names none, `stamp` changes when
    the content does, and `is_conversation` says that a chat template writes the rows.
    """

    path: str
    split: str
    name: str
    task: str
    data_format: str
    stamp: str
    is_conversation: bool = False

    @property
    def is_hub(self) -> bool:
        return self.split != ""


def find_sources(entries: list[str], split: str, data_format: str, streaming: bool = False) -> list[tuple[Source, ...]]:
    """Resolve every data set to its files and check the first row of each.

    Row numbers start at 1; in a .jsonl file they are line numbers.

    Args:
        entries: paths of .json, .jsonl or .parquet files, folders of them, or hub names ("name" or "name:config").
        split: split to read of a folder or a hub data set; files given by name are read whole.
        data_format: "auto" or a key of `formats.FORMATS`.
        streaming: open hub data sets without downloading them.

    Returns:
        one tuple of sources per entry.

    Raises:
        UserError: something is missing, empty, unreadable or has no known columns.
    """
    paths = [_files(Path(entry).expanduser(), split) if _is_local(entry) else [] for entry in entries]
    stems = [path.stem for files in paths for path in files]
    found = []
    for entry, files in zip(entries, paths, strict=True):
        if files:
            found.append(tuple(_file_source(path, data_format, stems.count(path.stem) > 1) for path in files))
        else:
            found.append((_hub_source(entry, split, data_format, streaming),))
    return found


def read_texts(sources: tuple[Source, ...], streaming: bool = False) -> Iterator[dict[str, str]]:
    """Yield the rows of all sources as records of `TEXT_FEATURES`.

    Raises:
        UserError: a broken line or a wrong type, with file and row number.
    """
    for source in sources:
        rows = _hub_rows(source, streaming) if source.is_hub else _file_rows(Path(source.path))
        for number, row in rows:
            where = f"{source.path} row {number}"
            text = to_text(row, source.data_format, where, source.is_conversation)
            task = row.get("task")
            if task is not None and not isinstance(task, str):
                raise UserError(f"{where}: column 'task' is {type(task).__name__}, expected text")
            yield {
                "record_id": f"{source.name}:{number}",
                "task": task or source.task,
                "prompt": text.prompt,
                "completion": text.completion,
                "conversation": text.conversation,
            }


def _is_local(entry: str) -> bool:
    """A hub name is "name" or "owner/name", maybe with ":config"; whatever exists or looks like a path is not one."""
    path = Path(entry).expanduser()
    if path.exists():
        return True
    if path.suffix in SUFFIXES or entry.startswith(("/", ".", "~")) or entry.count("/") > 1 or not entry.strip():
        raise UserError(f"data set {entry!r}: no such file or folder; check the path")
    return False


def _files(path: Path, split: str) -> list[Path]:
    """The data files of a path: itself, or those of a folder that belong to `split`."""
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise UserError(f"data set '{path}': unknown kind of file; accepted: {', '.join(SUFFIXES)}")
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    if not files:
        raise UserError(f"data set '{path}': the folder holds no {', '.join(SUFFIXES)} file; give another folder")
    splits = {file: _split_of(file, path) for file in files}
    if not any(splits.values()):
        return files
    wanted = next((name for name, words in SPLIT_WORDS.items() if split in words), split)
    chosen = [file for file in files if splits[file] == wanted]
    if not chosen:
        named = ", ".join(sorted({name for name in splits.values() if name}))
        raise UserError(f"data set '{path}': no file of split {split!r} (found: {named}); name the file itself")
    return chosen


def _split_of(file: Path, folder: Path) -> str:
    """The split a file name or a folder name inside the data set speaks of, or ""."""
    for part in (*file.relative_to(folder).parts[:-1], file.stem):
        words = part.lower().replace("-", "_").replace(".", "_").split("_")
        for name, known in SPLIT_WORDS.items():
            if any(word in known for word in words):
                return name
    return ""


def _file_source(path: Path, data_format: str, ambiguous: bool) -> Source:
    if path.stat().st_size == 0:
        raise UserError(f"data file '{path}' is empty; give a file with records")
    first = next(_file_rows(path), None)
    if first is None:
        raise UserError(f"data file '{path}' holds no records; give a file with records")
    # train.jsonl of two data sets would share one label: the folder's name tells them apart.
    folder = path.resolve().parent.name
    is_split = any(path.stem.lower() in words for words in SPLIT_WORDS.values())
    stat = path.stat()
    return Source(
        path=str(path),
        split="",
        name=f"{folder}/{path.stem}" if is_split or ambiguous else path.stem,
        task=folder if is_split else path.stem,
        data_format=detect_format(first[1], data_format, f"data file '{path}'"),
        stamp=f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}",
    )


def _hub_source(entry: str, split: str, data_format: str, streaming: bool) -> Source:
    data = _load_hub(entry, split, streaming)
    first = next(iter(data), None)
    if first is None:
        raise UserError(f"data set {entry!r}: split {split!r} is empty; choose another with --dataset_split")
    name = entry.split(":")[0].split("/")[-1]
    return Source(
        path=entry,
        split=split,
        name=name,
        task=name,
        data_format=detect_format(first, data_format, f"data set {entry!r}"),
        stamp=entry if streaming else data._fingerprint,
    )


def _load_hub(entry: str, split: str, streaming: bool) -> datasets.Dataset | datasets.IterableDataset:
    name, _, config = entry.partition(":")
    try:
        return datasets.load_dataset(name, config or None, split=split, streaming=streaming)
    except Exception as error:  # what the hub client raises has no common base
        reason = one_line(error, limit=200)
        raise UserError(
            f"data set {entry!r}: neither a file here nor loadable from the hub, split {split!r} ({reason}); "
            "check the name (owner/name or owner/name:config), the network, or give a local file"
        ) from error


def _hub_rows(source: Source, streaming: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    yield from enumerate(_load_hub(source.path, source.split, streaming), start=1)


def _file_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    rows = {".parquet": _parquet_rows, ".json": _json_rows}.get(path.suffix, _json_line_rows)(path)
    try:
        for number, row in rows:
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
                row = parse_json(line)
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
        rows = parse_json(content)
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
    number = 0
    for batch in file.iter_batches(batch_size=1000):
        for row in batch.to_pylist():
            number += 1
            yield number, row
