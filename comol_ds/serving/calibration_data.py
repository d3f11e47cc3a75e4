"""Tokens for approximate exports: one half of the records calibrates the static core, the other half judges it."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from comol_ds.adapters.kept_tokenizer import has_tokenizer
from comol_ds.config import DataSettings
from comol_ds.data.batches import EvalBatches
from comol_ds.data.prepare import validation_records
from comol_ds.errors import UserError
from comol_ds.export.source import AdapterSource

_SETTINGS = {field.name for field in fields(DataSettings)}


@dataclass(frozen=True)
class TokenSet:
    """Tokenized records, and what a reader of the export must know of them."""

    records: Dataset
    name: str
    batch_size: int
    pad_token_id: int

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """input_ids, attention_mask, labels [B, T], padded on the right; rows of similar length together."""
        for batch in EvalBatches(self.records, self.batch_size, 0, 1, self.pad_token_id):
            real = [row for row, record in enumerate(batch["record_ids"]) if record is not None]
            yield {name: batch[name][real] for name in ("input_ids", "attention_mask", "labels")}

    def as_json(self) -> dict[str, Any]:
        """Name, size and content hash (SHA-256 over every record's length and its token ids, little-endian int64)."""
        digest = hashlib.sha256()
        for ids in self.records["input_ids"]:
            digest.update(np.asarray([len(ids), *ids], dtype="<i8").tobytes())
        tokens = sum(self.records["length"][:])
        return {"data": self.name, "records": len(self.records), "tokens": tokens, "sha256": digest.hexdigest()}


def calibration_and_test(
    source: AdapterSource,
    tokenizer: PreTrainedTokenizerBase,
    entries: Sequence[str] | None,
    max_records: int,
    batch_size: int,
) -> tuple[TokenSet, TokenSet]:
    """A random half of the records calibrates, the other is held out of it and measures.

    Random, not every second record: data often takes its tasks in turn, as the embedded default does.

    Args:
        source: the adapter; its run says how records are tokenized.
        tokenizer: the adapter's.
        entries: data files, folders or hub names. None: the run's validation split.
        max_records: of both together, drawn by the run's seed.
        batch_size: rows per forward pass.

    Raises:
        UserError: there is no run to take a validation split of, or it has none, the data cannot be read, or they are
            one record only.
    """
    run = source.run or {}
    if entries is None and not run:
        raise UserError(f"{source.folder} lies in no run folder and has no validation split; give --calibration DATA")
    settings = DataSettings(**{name: value for name, value in run.items() if name in _SETTINGS})
    if entries is None and not settings.has_validation:
        raise UserError(
            f"the run of {source.folder} held out no validation records (--validation_split_percentage 0); give"
            " --calibration DATA"
        )
    settings.max_eval_records = max_records
    if has_tokenizer(source.folder) and settings.prompt_template not in (None, "chat", "alpaca", "none"):
        settings.prompt_template = "chat"  # the tokenizer has kept what the file said
    if entries is not None:
        settings.eval_dataset, settings.dataset_format = list(entries), "auto"
    # The run's columns are those of its own data, which data given here may have too.
    records = validation_records(settings, tokenizer, run.get("seed", 42), are_columns_sure=entries is None)
    name = ", ".join(entries) if entries else "the run's validation split"
    if len(records) < 2:
        raise UserError(f"{name} has {len(records)} usable records; calibration and its check need one each")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    order = np.random.default_rng(run.get("seed", 42)).permutation(len(records))
    halves = (np.sort(order[start::2]) for start in (0, 1))
    calibration, test = (TokenSet(records.select(half), name, batch_size, pad) for half in halves)
    return calibration, test
