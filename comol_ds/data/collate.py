"""Records to the tensors of one micro-batch. Shapes: B rows, T tokens of the longest row."""

from collections.abc import Sequence
from itertools import count
from typing import Any

import torch

from comol_ds.data.packing import join_records
from comol_ds.data.tokenization import IGNORED

NO_RECORD = -1  # in record_index: a token of padding


def padded_batch(records: Sequence[dict[str, Any] | None], pad_token_id: int) -> dict[str, Any]:
    """Rows padded on the right to the longest.

    None stands for a dummy row: one attended pad token (a row without any would give NaN in some attention kernels)
    and no label, so it adds nothing to a sum over labels; its record id and task are None.

    Returns:
        int64 `input_ids`, `labels`, `attention_mask` [B, T]; `record_index` [B, T], which record of the batch a token
        belongs to, -1 in padding and dummy rows; lists `record_ids`, `tasks` of length B.
    """
    rows = [record or _dummy(pad_token_id) for record in records]
    owners = [number if record else NO_RECORD for number, record in enumerate(records)]
    return {
        "input_ids": _stack([row["input_ids"] for row in rows], pad_token_id),
        "labels": _stack([row["labels"] for row in rows], IGNORED),
        "attention_mask": _stack([[1] * len(row["input_ids"]) for row in rows], 0),
        "record_index": _stack(
            [[owner] * len(row["input_ids"]) for owner, row in zip(owners, rows, strict=True)], NO_RECORD
        ),
        "record_ids": [row["record_id"] for row in rows],
        "tasks": [row["task"] for row in rows],
    }


def packed_batch(bins: Sequence[Sequence[dict[str, Any]]], pad_token_id: int) -> dict[str, Any]:
    """Several records per row, padded on the right to the longest row; the pad tail is one more sequence.

    Returns:
        int64 `input_ids`, `labels`, `position_ids` [B, T]; `record_index` [B, T] as in `padded_batch`; `record_ids` and
        `tasks` of all records, row after row.
    """
    rows = [join_records(records) for records in bins]
    number = count()
    owners = [[owner for record in records for owner in [next(number)] * len(record["input_ids"])] for records in bins]
    longest = max(len(row["input_ids"]) for row in rows)
    positions = [[*row["position_ids"], *range(longest - len(row["position_ids"]))] for row in rows]
    return {
        "input_ids": _stack([row["input_ids"] for row in rows], pad_token_id),
        "labels": _stack([row["labels"] for row in rows], IGNORED),
        "position_ids": torch.tensor(positions),
        "record_index": _stack(owners, NO_RECORD),
        "record_ids": [record["record_id"] for records in bins for record in records],
        "tasks": [record["task"] for records in bins for record in records],
    }


def prompt_batch(records: Sequence[dict[str, Any] | None], pad_token_id: int) -> dict[str, Any]:
    """Prompts padded on the left, for generation; None stands for a dummy row as in `padded_batch`.

    Returns:
        int64 `input_ids`, `attention_mask` [B, T]; lists `references`, `record_ids`, `tasks` of length B, with None
        for dummy rows; `end_tokens`, the ids that the answers are trained to end with.
    """
    whole = [record["input_ids"] for record in records if record and not record["truncated"]]
    rows = [record or _dummy(pad_token_id) for record in records]
    prompts = [row["input_ids"][: row["prompt_length"]] for row in rows]
    return {
        "input_ids": _stack(prompts, pad_token_id, left=True),
        "attention_mask": _stack([[1] * len(prompt) for prompt in prompts], 0, left=True),
        "end_tokens": sorted({ids[-1] for ids in whole}),
        "references": [row["reference"] for row in rows],
        "record_ids": [row["record_id"] for row in rows],
        "tasks": [row["task"] for row in rows],
    }


def _dummy(pad_token_id: int) -> dict[str, Any]:
    nothing = {"record_id": None, "task": None, "reference": None}
    return {"input_ids": [pad_token_id], "labels": [IGNORED], "prompt_length": 1, **nothing}


def _stack(rows: Sequence[Sequence[int]], filler: int, left: bool = False) -> torch.Tensor:
    longest = max(len(row) for row in rows)
    tails = [[filler] * (longest - len(row)) for row in rows]
    joined = [[*tail, *row] if left else [*row, *tail] for row, tail in zip(rows, tails, strict=True)]
    return torch.tensor(joined, dtype=torch.int64)  # [B, T]
