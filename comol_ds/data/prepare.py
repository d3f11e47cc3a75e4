"""The data of a run: from settings to tokenized training and validation records.

Several data sets are concatenated, or mixed by weight: a mixture has as many records as its data sets together, of
which data set i gives the share weight_i / sum(weights), repeating its records if it has too few and taking a random
subset, drawn once from the seed, if it has too many. Streams are mixed by drawing the next record's data set with
these probabilities, until one of them ends; without weights one stream follows the other.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from comol_ds.config import DataSettings
from comol_ds.data.formats import parse_columns, used_columns
from comol_ds.data.sources import Source, find_sources
from comol_ds.data.templates import PromptTemplate, resolve_template
from comol_ds.data.token_cache import stamp_of, token_stream, tokenized, user_errors
from comol_ds.data.tokenization import TOKEN_FEATURES, RecordTokenizer, first_line
from comol_ds.errors import UserError

STREAM_PROBE = 1000  # records of a stream that are checked before the run
# Streams of random numbers that must not repeat each other.
_HOLD_OUT, _MIX, _LIMIT_TRAIN, _LIMIT_VALIDATION = range(4)


@dataclass
class DataReport:
    """What was read, cut and dropped; counts of records unless said otherwise.

    `probed` says that only the first records of a stream were counted. `stamps`: flag and name of every data set ->
    what another content would change, see `token_cache.Tokenized`. `unused`: columns that no record is made of.
    `template`: the name of what writes the prompts.
    """

    max_length: int
    probed: bool = False
    read: int = 0
    truncated: int = 0
    dropped: int = 0
    unlabeled_turns: int = 0
    stripped_reasoning: int = 0
    train: int | None = None
    validation: int = 0
    train_tokens: int | None = None
    trained_tokens: int | None = None
    tasks: dict[str, int] = field(default_factory=dict)
    stamps: dict[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    template: str = "none"

    def summary(self) -> str:
        """One line for the log."""
        start = f"data: first {self.read} records of the stream" if self.probed else f"data: {self.read} records read"
        counts = (
            f"{start}, {self.truncated} cut at max_length {self.max_length}, {self.dropped} dropped without any label"
            + self._lost()
            + f"; columns not used: {', '.join(self.unused)}" * bool(self.unused)
        )
        if self.train is None or self.train_tokens is None or self.trained_tokens is None:
            return f"{counts}; {self.validation} for validation; prompt template {self.template}"
        share = 100 * self.trained_tokens / max(1, self.train_tokens)
        return (
            f"{counts}; {self.train} for training ({self.train_tokens} tokens, {share:.0f} % with loss), "
            f"{self.validation} for validation; {len(self.tasks)} task{'s' * (len(self.tasks) != 1)}; "
            f"prompt template {self.template}"
        )

    def _lost(self) -> str:
        """What the chat template leaves untrained, if anything."""
        turns = f", {self.unlabeled_turns} earlier answers without label since the chat template rewrites them"
        reasoning = f", {self.stripped_reasoning} answers without their reasoning, which the chat template leaves out"
        return turns * bool(self.unlabeled_turns) + reasoning * bool(self.stripped_reasoning)


@dataclass
class PreparedData:
    """Training and validation records with the columns of `tokenization.TOKEN_FEATURES`; all have a label.

    `template` wrote the prompts: a tokenizer with its `chat_template` sends what was trained.
    """

    train: datasets.Dataset | datasets.IterableDataset
    validation: datasets.Dataset
    report: DataReport
    template: PromptTemplate


def prepare_data(settings: DataSettings, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreparedData:
    """Read, check, tokenize, split and mix the data of a run.

    Deterministic in its arguments and the files' content. Tokenized data are cached on disk, so one process of a node
    should call this first; the others then find its work.

    Args:
        settings: what to read and how; `dataset` must be given. Folders and hub names among `eval_dataset` are read
            at their validation split. Without `has_validation` there are no validation records.
        tokenizer: has an end-of-sequence token, and a chat template for data in the messages format.
        seed: decides which records are held out and which subset is taken.

    Raises:
        UserError: the data cannot be used; the message names the file, the row or the setting.
    """
    assert settings.dataset, "the launcher fills in the embedded data set"
    sources = find_sources(
        settings.dataset,
        settings.dataset_split,
        settings.dataset_format,
        settings.streaming,
        parse_columns(settings.columns),
    )
    held_out = _eval_sources(settings)
    template = _template([*sources, *held_out], settings, tokenizer)
    encode = _encoder(settings, tokenizer, template)
    sources = _written_by(template, sources)
    report = DataReport(settings.max_length, settings.streaming, unused=_unused(sources), template=template.name)
    evaluation = _evaluation(_written_by(template, held_out), settings, encode, report.stamps)
    if settings.streaming:
        train: datasets.Dataset | datasets.IterableDataset = _stream(sources, encode, settings, seed, report)
    else:
        parts = [_read(group, encode, settings, report) for group in sources]
        if settings.has_validation and not evaluation:
            parts, evaluation = _hold_out(parts, settings.validation_split_percentage, seed)
        train = _limit(_mix(parts, settings.dataset_weights, seed), settings.max_train_records, seed, _LIMIT_TRAIN)
        report.train = len(train)
        report.train_tokens, report.trained_tokens = sum(train["length"][:]), sum(train["trained_tokens"][:])
        report.tasks = dict(sorted(Counter(train["task"][:]).items()))
    held_out = datasets.concatenate_datasets(evaluation) if evaluation else _no_records()
    validation = _limit(held_out, settings.max_eval_records, seed, _LIMIT_VALIDATION)
    report.validation = len(validation)
    return PreparedData(train, validation, report, template)


def validation_records(
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, seed: int, are_columns_sure: bool = True
) -> datasets.Dataset:
    """The validation records of `prepare_data` alone: training data are read only if they are held out of them.

    Args:
        are_columns_sure: each data set must have the columns that `settings.columns` names; else those it lacks keep
            the names they have.

    Raises:
        UserError: as `prepare_data`.
    """
    if not settings.eval_dataset:
        return prepare_data(settings, tokenizer, seed).validation
    sources = _eval_sources(settings, are_columns_sure)
    template = _template(sources, settings, tokenizer)
    encode = _encoder(settings, tokenizer, template)
    records = datasets.concatenate_datasets(_evaluation(_written_by(template, sources), settings, encode, stamps={}))
    return _limit(records, settings.max_eval_records, seed, _LIMIT_VALIDATION)


def _unused(sources: list[tuple[Source, ...]]) -> tuple[str, ...]:
    """Columns of the data sets that reach no record."""
    columns = {
        column
        for group in sources
        for source in group
        for column in set(source.columns) - used_columns(source.data_format, source.is_conversation)
    }
    return tuple(sorted(columns))


def _eval_sources(settings: DataSettings, are_columns_sure: bool = True) -> list[tuple[Source, ...]]:
    return find_sources(
        settings.eval_dataset or [],
        "validation",
        settings.dataset_format,
        renamed=parse_columns(settings.columns),
        are_columns_sure=are_columns_sure,
    )


def _template(
    sources: list[tuple[Source, ...]], settings: DataSettings, tokenizer: PreTrainedTokenizerBase
) -> PromptTemplate:
    """What writes the prompts of all data sets."""
    first_of = {source.data_format: source.path for group in sources for source in group}
    return resolve_template(tokenizer, settings.prompt_template, first_of)


def _written_by(template: PromptTemplate, sources: list[tuple[Source, ...]]) -> list[tuple[Source, ...]]:
    return [
        tuple(replace(source, is_conversation=template.writes(source.data_format)) for source in group)
        for group in sources
    ]


def _encoder(settings: DataSettings, tokenizer: PreTrainedTokenizerBase, template: PromptTemplate) -> RecordTokenizer:
    return RecordTokenizer(tokenizer, settings.max_length, settings.train_on_prompt, template.chat_template)


def _evaluation(
    sources: list[tuple[Source, ...]], settings: DataSettings, encode: RecordTokenizer, stamps: dict[str, str]
) -> list[datasets.Dataset]:
    """The usable records of every --eval_dataset, whose stamps are added."""
    counts = DataReport(settings.max_length, stamps=stamps)
    return [_read(group, encode, settings, counts, "eval_dataset") for group in sources]


def _read(
    sources: tuple[Source, ...],
    encode: RecordTokenizer,
    settings: DataSettings,
    report: DataReport,
    flag: str = "dataset",
) -> datasets.Dataset:
    """The usable records of one data set, which a flag named; counts and the stamp go to the report."""
    found = tokenized(sources, encode, settings.preprocessing_num_workers, settings.overwrite_cache)
    data = found.records
    report.stamps[f"{flag} {_label(sources)}"] = found.stamp
    trained = np.asarray(data["trained_tokens"][:])
    report.read += len(data)
    report.dropped += int((trained == 0).sum())
    report.truncated += int((np.asarray(data["truncated"][:]) & (trained > 0)).sum())
    report.unlabeled_turns += sum(data["unlabeled_turns"][:])
    report.stripped_reasoning += sum(data["stripped_reasoning"][:])
    lengths = np.asarray(data["prompt_length"][:])
    _check_dropped(_name(sources), trained == 0, lengths, lambda row: data[row], encode, settings.max_dropped_fraction)
    return data.select(np.flatnonzero(trained > 0))


def _stream(
    sources: list[tuple[Source, ...]], encode: RecordTokenizer, settings: DataSettings, seed: int, report: DataReport
) -> datasets.IterableDataset:
    """All data sets as one stream, after a look at the first records of each."""
    streams = []
    for group in sources:
        stream = token_stream(group, encode)
        with user_errors():
            head = list(islice(stream, STREAM_PROBE))
        size = sum(Path(source.path).stat().st_size for source in group if not source.is_hub)
        stamp = stamp_of(datasets.Dataset.from_list(head, features=TOKEN_FEATURES))
        report.stamps[f"dataset {_label(group)}"] = f"{size} bytes, first {stamp}"
        empty = np.array([record["trained_tokens"] == 0 for record in head])
        lengths = np.array([record["prompt_length"] for record in head])
        report.read += len(head)
        report.dropped += int(empty.sum())
        report.truncated += sum(record["truncated"] and record["trained_tokens"] > 0 for record in head)
        report.unlabeled_turns += sum(record["unlabeled_turns"] for record in head)
        report.stripped_reasoning += sum(record["stripped_reasoning"] for record in head)
        _check_dropped(_name(group), empty, lengths, head.__getitem__, encode, settings.max_dropped_fraction)
        streams.append(stream.filter(lambda record: record["trained_tokens"] > 0))
    if len(streams) == 1:
        return _first(streams[0], settings.max_train_records)
    if settings.dataset_weights is None:
        return _first(datasets.concatenate_datasets(streams), settings.max_train_records)
    shares = _shares(settings.dataset_weights)
    mixed = datasets.interleave_datasets(streams, probabilities=shares, seed=seed, stopping_strategy="first_exhausted")
    return _first(mixed, settings.max_train_records)


def _check_dropped(
    name: str,
    empty: np.ndarray,
    prompt_lengths: np.ndarray,
    record_at: Callable[[int], dict[str, Any]],
    encode: RecordTokenizer,
    limit: float,
) -> None:
    """Refuse a data set that loses more than `limit` of its records, showing one of them.

    Args:
        name: of the data set.
        empty: bool array [records], no label left.
        prompt_lengths: int array [records], tokens before the last answer.
        record_at: row number -> tokenized record.
    """
    if not empty.any() or empty.mean() <= limit:
        return
    if prompt_lengths.min() >= encode.max_length:
        raise UserError(
            f"{name}: every prompt is longer than max_length {encode.max_length} leaves room for "
            f"(the shortest has {prompt_lengths.min()} tokens); raise --max_length"
        )
    row = int(np.flatnonzero(empty)[0])
    record = record_at(row)
    why = "its answer is empty"
    if record["unlabeled_turns"]:
        why = "nobody asks for its only answer (such records belong in the format text)"
    if record["prompt_length"] >= encode.max_length:
        why = f"its prompt of {record['prompt_length']} tokens fills max_length {encode.max_length}"
    raise UserError(
        f"{name}: {int(empty.sum())} of {len(empty)} records have no label, more than max_dropped_fraction {limit}; "
        f"for example {record['record_id']}, where {why}: {first_line(record['input_ids'], encode.tokenizer)!r}; "
        "raise --max_length, repair the data or raise --max_dropped_fraction"
    )


def _name(sources: tuple[Source, ...]) -> str:
    return f"data set {_label(sources)}"


def _label(sources: tuple[Source, ...]) -> str:
    others = f" and {len(sources) - 1} more" if len(sources) > 1 else ""
    return f"{sources[0].path!r}{others}"


def _hold_out(
    parts: list[datasets.Dataset], percentage: float, seed: int
) -> tuple[list[datasets.Dataset], list[datasets.Dataset]]:
    """Take `percentage` of every data set, at least one record each, away from training."""
    train, validation = [], []
    for number, part in enumerate(parts):
        count = max(1, round(len(part) * percentage / 100))
        if count >= len(part):
            raise UserError(
                f"holding out {percentage} % for validation leaves nothing of data set number {number + 1} with "
                f"{len(part)} usable records; give --eval_dataset or more data"
            )
        order = np.random.default_rng((seed, _HOLD_OUT, number)).permutation(len(part))
        validation.append(part.select(np.sort(order[:count])))
        train.append(part.select(np.sort(order[count:])))
    return train, validation


def _mix(parts: list[datasets.Dataset], weights: Sequence[float] | None, seed: int) -> datasets.Dataset:
    """One data set of all parts, in the shares the module's docstring defines; their order is kept."""
    if weights is not None:
        total = sum(len(part) for part in parts)
        counts = [max(1, round(total * share)) for share in _shares(weights)]
        parts = [
            part.select(_repeated(len(part), count, np.random.default_rng((seed, _MIX, number))))
            for number, (part, count) in enumerate(zip(parts, counts, strict=True))
        ]
    return datasets.concatenate_datasets(parts)


def _repeated(size: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` row numbers below `size`: whole passes, then a random subset without repetition."""
    passes = np.tile(np.arange(size), count // size)
    return np.concatenate([passes, np.sort(rng.permutation(size)[: count % size])])


def _shares(weights: Sequence[float]) -> list[float]:
    return [weight / sum(weights) for weight in weights]


def _limit(data: datasets.Dataset, maximum: int | None, seed: int, purpose: int) -> datasets.Dataset:
    """A random subset of at most `maximum` records, in their order."""
    if maximum is None or maximum >= len(data):
        return data
    return data.select(np.sort(np.random.default_rng((seed, purpose)).permutation(len(data))[:maximum]))


def _no_records() -> datasets.Dataset:
    return datasets.Dataset.from_dict({name: [] for name in TOKEN_FEATURES}, features=TOKEN_FEATURES)


def _first(stream: datasets.IterableDataset, maximum: int | None) -> datasets.IterableDataset:
    return stream if maximum is None else stream.take(maximum)
