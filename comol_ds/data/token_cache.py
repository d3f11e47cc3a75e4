"""Tokenized data sets on disk: built once per node, found again by everybody else.

A folder per data set under the datasets cache (HF_DATASETS_CACHE), named by a hash of all that decides its content:
the files with size and time of change, the format, the tokenizer, the length and the code that reads and tokenizes.
`comol_ds.data.verified_folder` keeps the folders.
"""

import hashlib
import inspect
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
from pyarrow import compute

from comol_ds.data import chat, formats, marks, rows, token_ids, tokenization, turns
from comol_ds.data import sources as source_files
from comol_ds.data.sources import TEXT_FEATURES, Source, read_texts
from comol_ds.data.tokenization import TOKEN_FEATURES, RecordTokenizer, tokenizer_fingerprint
from comol_ds.data.verified_folder import open_folder
from comol_ds.errors import UserError

# What was cached since is the work of this run, maybe of another rank: overwrite_cache concerns older results.
_RUN_STARTED = time.time()
_SHOW_PROGRESS_FROM = 50_000  # records; fewer take seconds


@dataclass(frozen=True)
class Tokenized:
    """The records of one data set.

    Attributes:
        records: with the columns of `TOKEN_FEATURES`.
        stamp: their number and a checksum of their tokens and labels: the same wherever the same is trained.
    """

    records: datasets.Dataset
    stamp: str


def tokenized(sources: tuple[Source, ...], encode: RecordTokenizer, workers: int | None, overwrite: bool) -> Tokenized:
    """The records of one data set, from the cache or built into it.

    Args:
        sources: the files of the data set.
        encode: turns text into tokens.
        workers: processes that tokenize; None: this one.
        overwrite: do not use results from before this run.

    Raises:
        UserError: a record cannot be read or tokenized, or the cache folder cannot be written.
    """
    root = Path(datasets.config.HF_DATASETS_CACHE) / "comol_ds"
    key = _key(sources, encode)
    try:
        folder, facts = open_folder(
            root,
            key,
            lambda built, scratch: _build(sources, encode, workers, built, scratch, key),
            lambda folder: overwrite and folder.stat().st_mtime < _RUN_STARTED,
        )
    except OSError as error:
        raise UserError(
            f"cannot write tokenized data under {root} ({error.strerror or error}); "
            "set HF_DATASETS_CACHE to a folder with space"
        ) from error
    return Tokenized(datasets.load_from_disk(str(folder)), facts["stamp"])


def stamp_of(records: datasets.Dataset) -> str:
    """`Tokenized.stamp` of records."""
    checksum = hashlib.blake2b(digest_size=8)
    for batch in records.with_format("arrow").iter(batch_size=1000):
        for name in ("input_ids", "labels"):
            for values in (compute.list_value_length(batch[name]), compute.list_flatten(batch[name])):
                checksum.update(values.to_numpy().astype("<i4").tobytes())
    return f"{len(records)} records, {checksum.hexdigest()}"


def token_stream(sources: tuple[Source, ...], encode: RecordTokenizer) -> datasets.IterableDataset:
    """The same records, read and tokenized when asked for."""
    texts = datasets.IterableDataset.from_generator(
        read_texts, features=TEXT_FEATURES, gen_kwargs={"sources": sources, "streaming": True}
    )
    return texts.map(encode, batched=True, batch_size=100, remove_columns=list(TEXT_FEATURES), features=TOKEN_FEATURES)


@contextmanager
def user_errors() -> Iterator[None]:
    """Raise the UserError or OSError that datasets wrapped in its own exceptions."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, UserError | OSError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        raise


def _key(sources: tuple[Source, ...], encode: RecordTokenizer) -> str:
    parts = [
        [asdict(source) for source in sources],
        tokenizer_fingerprint(encode.tokenizer),
        encode.max_length,
        encode.train_on_prompt,
        encode.chat_template,
        [
            inspect.getsource(module)
            for module in (chat, formats, marks, rows, source_files, token_ids, tokenization, turns)
        ],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _build(
    sources: tuple[Source, ...], encode: RecordTokenizer, workers: int | None, built: Path, scratch: Path, key: str
) -> dict[str, Any]:
    """Tokenize into the folder ``built``, with temporary files in ``scratch``; see `open_folder`."""
    with _progress_bars(False), user_errors():
        texts = datasets.Dataset.from_generator(
            read_texts,
            features=TEXT_FEATURES,
            gen_kwargs={"sources": sources},
            cache_dir=str(scratch / "texts"),
            fingerprint=key,
        )
    with _progress_bars(len(texts) >= _SHOW_PROGRESS_FROM), user_errors():
        tokens = texts.map(
            encode,
            batched=True,
            num_proc=workers,
            remove_columns=list(TEXT_FEATURES),
            features=TOKEN_FEATURES,
            cache_file_name=str(scratch / "map.arrow"),
            new_fingerprint=key,
            desc="tokenize",
        )
    with _progress_bars(False):
        tokens.save_to_disk(str(built))
    return {"stamp": stamp_of(tokens)}


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    before = datasets.are_progress_bars_disabled()
    (datasets.enable_progress_bars if shown else datasets.disable_progress_bars)()
    try:
        yield
    finally:
        (datasets.disable_progress_bars if before else datasets.enable_progress_bars)()
