"""Tokenized data sets on disk: built once per node, found again by everybody else.

A folder per data set under the datasets cache (HF_DATASETS_CACHE), named by a hash of all that decides its content:
the files with size and time of change, the format, the tokenizer, the length and the code that reads and tokenizes.
It appears by one rename, so processes that build the same one at the same time cannot harm each other.
"""

import hashlib
import inspect
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import datasets

from comol_ds.data import formats, tokenization
from comol_ds.data import sources as source_files
from comol_ds.data.sources import TEXT_FEATURES, Source, read_texts
from comol_ds.data.tokenization import TOKEN_FEATURES, RecordTokenizer, tokenizer_fingerprint
from comol_ds.errors import UserError

# What was cached since is the work of this run, maybe of another rank: overwrite_cache concerns older results.
_RUN_STARTED = time.time()
_SHOW_PROGRESS_FROM = 50_000  # records; fewer take seconds


def tokenized(
    sources: tuple[Source, ...], encode: RecordTokenizer, workers: int | None, overwrite: bool
) -> datasets.Dataset:
    """The records of one data set as `TOKEN_FEATURES`, from the cache or built into it.

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
    folder = root / key
    if not folder.exists() or (overwrite and folder.stat().st_mtime < _RUN_STARTED):
        try:
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=root, prefix="building-") as scratch:
                _build(sources, encode, workers, Path(scratch), key)
                _publish(Path(scratch) / "tokens", folder, overwrite)
        except OSError as error:
            raise UserError(
                f"cannot write tokenized data under {root} ({error.strerror or error}); "
                "set HF_DATASETS_CACHE to a folder with space"
            ) from error
    return datasets.load_from_disk(str(folder))


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
        [inspect.getsource(module) for module in (formats, source_files, tokenization)],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _build(sources: tuple[Source, ...], encode: RecordTokenizer, workers: int | None, scratch: Path, key: str) -> None:
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
        tokens.save_to_disk(str(scratch / "tokens"))


def _publish(built: Path, folder: Path, overwrite: bool) -> None:
    if overwrite and folder.exists() and folder.stat().st_mtime < _RUN_STARTED:
        shutil.rmtree(folder)
    try:
        os.replace(built, folder)
    except OSError:
        # Another process was faster: its result has the same key, so the same content.
        if not folder.exists():
            raise


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    before = datasets.are_progress_bars_disabled()
    (datasets.enable_progress_bars if shown else datasets.disable_progress_bars)()
    try:
        yield
    finally:
        (datasets.disable_progress_bars if before else datasets.enable_progress_bars)()
