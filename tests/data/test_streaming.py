"""Batches from a stream: shares of ranks, endless reading, resuming, packing."""

from itertools import islice

import pytest
import torch

from comol_ds.data.prepare import prepare_data
from comol_ds.data.streaming import StreamingBatches
from comol_ds.errors import UserError
from comol_ds.layout import BatchLayout
from tests.data.data_helpers import settings, sums, tiny_tokenizer, write_jsonl


@pytest.fixture
def stream(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", sums(50))
    return prepare_data(settings(path, eval_dataset=[path], streaming=True), tiny_tokenizer(), 1).train


def batches(stream, micro=2, accumulation=1, rank=0, world=1, packing=False):
    return StreamingBatches(stream, BatchLayout(world, micro, accumulation), rank, 5, packing, 128, 0)


def ids(steps):
    return [[batch["record_ids"] for batch in step] for step in steps]


@pytest.mark.parametrize("packing", [False, True])
def test_a_step_is_the_same_records_however_it_is_split(stream, packing):
    def steps(micro, accumulation, world):
        ranks = [islice(batches(stream, micro, accumulation, r, world, packing).epoch(0), 3) for r in range(world)]
        return [
            sorted(n for part in step for batch in part for n in batch["record_ids"])
            for step in zip(*ranks, strict=True)
        ]

    assert steps(4, 1, 1) == steps(1, 4, 1) == steps(2, 1, 2) == steps(1, 2, 2)


def test_the_stream_is_read_again_in_another_order(stream):
    names = [name for step in islice(batches(stream, 10).epoch(0), 10) for name in step[0]["record_ids"]]
    assert set(names[:50]) == set(names[50:]) and len(set(names)) == 50
    assert names[:50] != names[50:] and names[:50] != [f"x:{i}" for i in range(1, 51)]


@pytest.mark.parametrize("packing", [False, True])
def test_resuming_skips_what_was_trained_on(stream, packing):
    whole = list(islice(batches(stream, packing=packing).epoch(0), 40))
    epoch, step = batches(stream, packing=packing).locate(31)
    rest = list(islice(batches(stream, packing=packing).epoch(epoch, step), 9))
    assert ids(rest) == ids(whole[31:])
    assert torch.equal(rest[0][0]["input_ids"], whole[31][0]["input_ids"])


def test_packed_rows_hold_several_records_without_attention_mask(stream):
    ((batch,),) = islice(batches(stream, 1, packing=True).epoch(0), 1)
    assert len(batch["record_ids"]) > 1 and batch["input_ids"].shape[1] <= 128
    assert (batch["position_ids"][0] == 0).sum() >= len(batch["record_ids"])
    assert "attention_mask" not in batch


def test_length_is_unknown_and_emptiness_is_told(stream):
    assert batches(stream).steps_per_epoch is None
    with pytest.raises(UserError, match="the stream of training data has no usable record"):
        next(batches(stream.filter(lambda record: False)).epoch(0))
