"""Where records come from: files, folders and hub names, checked early and read row by row."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from comol_ds.data.formats import detect_format, present_columns, rename_columns, to_text
from comol_ds.data.rows import SUFFIXES, file_rows, is_saved, without_nulls
from comol_ds.errors import UserError, one_line
from comol_ds.output_folder import EXPORT_MARK, RUN_MARK
from comol_ds.text_files import read_json

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
    """One file, one folder of `Dataset.save_to_disk`, or one split of a hub data set.

    `name` labels its records ("<name>:<row number>"), `task` is their task when a row names none, `stamp` changes when
    the content does, `columns` are those of the first row by their names here, `renamed` gives columns other names, as
    (name here, name there), and `is_conversation` says that a chat template writes the rows.
    """

    path: str
    split: str
    name: str
    task: str
    data_format: str
    stamp: str
    columns: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    is_conversation: bool = False

    @property
    def is_hub(self) -> bool:
        return self.split != ""


def find_sources(
    entries: list[str],
    split: str,
    data_format: str,
    streaming: bool = False,
    renamed: tuple[tuple[str, str], ...] = (),
    are_columns_sure: bool = True,
) -> list[tuple[Source, ...]]:
    """Resolve every data set to its files and check the first row of each.

    Row numbers start at 1; in a .jsonl file they are line numbers.

    Args:
        entries: paths of .json, .jsonl or .parquet files, folders of them or of save_to_disk, or hub names ("name" or
            "name:config").
        split: split to read of a folder or a hub data set; files given by name are read whole.
        data_format: "auto" or a key of `formats.FORMATS`.
        streaming: open hub data sets without downloading them.
        renamed: (name here, name there) of columns, as `formats.parse_columns` gives them.
        are_columns_sure: every data set must have these columns; else only those that it has are renamed.

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
            found.append(
                tuple(
                    _file_source(path, data_format, stems.count(path.stem) > 1, renamed, are_columns_sure)
                    for path in files
                )
            )
        else:
            found.append((_hub_source(entry, split, data_format, streaming, renamed, are_columns_sure),))
    return found


def read_texts(sources: tuple[Source, ...], streaming: bool = False) -> Iterator[dict[str, str]]:
    """Yield the rows of all sources as records of `TEXT_FEATURES`.

    Raises:
        UserError: a broken line or a wrong type, with file and row number.
    """
    for source in sources:
        rows = _hub_rows(source, streaming) if source.is_hub else file_rows(Path(source.path))
        for number, given in rows:
            where = f"{source.path} row {number}"
            row = rename_columns(given, source.renamed)
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


_NO_DATA = (".", "__")  # how names of files and folders begin that hold no data


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
    if is_saved(path):
        return [path]
    if (path / "dataset_dict.json").is_file():
        return [_saved_split(path, split)]
    files = sorted(_data_files(path))
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


def _data_files(folder: Path) -> Iterator[Path]:
    """The data files below a folder. What editors and file managers leave (.ipynb_checkpoints, ._x.jsonl, __MACOSX) is
    no data, nor are the logs of runs and what exports wrote."""
    for path, folders, names in os.walk(folder):
        here = Path(path)
        if here != folder and any((here / mark).exists() for mark in (RUN_MARK, EXPORT_MARK)):
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(_NO_DATA)]
        for name in names:
            file = here / name
            if file.suffix in SUFFIXES and not name.startswith(_NO_DATA) and file.is_file():
                yield file


def _saved_split(path: Path, split: str) -> Path:
    """The folder of a split below one that `DatasetDict.save_to_disk` has written."""
    try:
        names = [name for name in read_json(path / "dataset_dict.json")["splits"] if is_saved(path / name)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"data set '{path}': its dataset_dict.json is not what save_to_disk writes; write it again"
        ) from error
    words = next((words for name, words in SPLIT_WORDS.items() if split == name or split in words), (split,))
    chosen = [name for name in names if name == split] or [name for name in names if name.lower() in words]
    if not chosen:
        raise UserError(
            f"data set '{path}': no split {split!r} (found: {', '.join(names) or 'none'}); name the split's folder"
        )
    return path / chosen[0]


def _split_of(file: Path, folder: Path) -> str:
    """The split a file name or a folder name inside the data set speaks of, or ""."""
    for part in (*file.relative_to(folder).parts[:-1], file.stem):
        words = part.lower().replace("-", "_").replace(".", "_").split("_")
        for name, known in SPLIT_WORDS.items():
            if any(word in known for word in words):
                return name
    return ""


def _file_source(
    path: Path, data_format: str, ambiguous: bool, renamed: tuple[tuple[str, str], ...], are_columns_sure: bool
) -> Source:
    if path.stat().st_size == 0:
        raise UserError(f"data file '{path}' is empty; give a file with records")
    first = next(file_rows(path), None)
    if first is None:
        raise UserError(f"data file '{path}' holds no records; give a file with records")
    renamed = renamed if are_columns_sure else present_columns(first[1], renamed)
    row = rename_columns(first[1], renamed, f"data file '{path}'")
    # train.jsonl of two data sets would share one label: the folder's name tells them apart.
    folder = path.resolve().parent.name
    is_split = any(path.stem.lower() in words for words in SPLIT_WORDS.values())
    parts = sorted(path.iterdir()) if path.is_dir() else [path]
    stats = [(part.name, part.stat().st_size, part.stat().st_mtime_ns) for part in parts]
    return Source(
        path=str(path),
        split="",
        name=f"{folder}/{path.stem}" if is_split or ambiguous else path.stem,
        task=folder if is_split else path.stem,
        data_format=detect_format(row, data_format, f"data file '{path}'"),
        stamp=f"{path.resolve()} {stats}",
        columns=tuple(row),
        renamed=renamed,
    )


def _hub_source(
    entry: str,
    split: str,
    data_format: str,
    streaming: bool,
    renamed: tuple[tuple[str, str], ...],
    are_columns_sure: bool,
) -> Source:
    data = _load_hub(entry, split, streaming)
    first = next(iter(data), None)
    if first is None:
        raise UserError(f"data set {entry!r}: split {split!r} is empty; choose another with --dataset_split")
    renamed = renamed if are_columns_sure else present_columns(first, renamed)
    row = rename_columns(first, renamed, f"data set {entry!r}")
    name = entry.split(":")[0].split("/")[-1]
    return Source(
        path=entry,
        split=split,
        name=name,
        task=name,
        data_format=detect_format(row, data_format, f"data set {entry!r}"),
        stamp=entry if streaming else data._fingerprint,
        columns=tuple(row),
        renamed=renamed,
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
    yield from enumerate(without_nulls(_load_hub(source.path, source.split, streaming)), start=1)
