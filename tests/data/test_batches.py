"""Who gets which records: the same for any split of a global batch, resumable, and equally many for evaluation."""

import pytest
import torch
from datasets import Dataset

from comol_ds.data.batches import EvalBatches, TrainBatches, generation_batches
from comol_ds.data.prepare import prepare_data
from comol_ds.data.tokenization import IGNORED
from comol_ds.errors import UserError
from comol_ds.layout import BatchLayout
from tests.data.data_helpers import real_data, settings, tiny_tokenizer

PAD = 0


def records(count: int, longest: int = 40, tasks: int = 2) -> Dataset:
    rows = []
    for i in range(count):
        length = 3 + (i * 7) % (longest - 2)
        ids = [3 + i % 90] * length
        rows.append(
            {
                "record_id": f"x:{i}",
                "task": f"task{i % tasks}" if i < count - 3 else "rare",
                "input_ids": ids,
                "labels": [IGNORED, IGNORED, *ids[2:]],
                "length": length,
                "trained_tokens": length - 2,
                "prompt_length": 2,
                "reference": f"answer {i}",
                "truncated": False,
            }
        )
    return Dataset.from_list(rows)


def batches(data, micro=2, accumulation=1, rank=0, world=1, seed=5, **changes) -> TrainBatches:
    options = {"packing": False, "group_by_length": False, "max_length": 40, "pad_token_id": PAD} | changes
    return TrainBatches(data, BatchLayout(world, micro, accumulation), rank, seed, **options)


KINDS = pytest.mark.parametrize(
    "kind", [{}, {"packing": True}, {"group_by_length": True}], ids=["plain", "packed", "grouped"]
)


def steps_of(data, splits, epoch=0, **kind) -> list[list[list[str]]]:
    """Sorted record ids of every step over all ranks, for each (micro, accumulation, world)."""
    found = []
    for micro, accumulation, world in splits:
        ranks = [list(batches(data, micro, accumulation, rank, world, **kind).epoch(epoch)) for rank in range(world)]
        found.append(
            [
                sorted(n for part in step for batch in part for n in batch["record_ids"])
                for step in zip(*ranks, strict=True)
            ]
        )
    return found


@KINDS
def test_a_step_is_the_same_records_however_it_is_split(kind):
    data = records(103)
    splits = [(8, 1, 1), (2, 4, 1), (2, 1, 4), (1, 4, 2), (4, 2, 1), (1, 8, 1)]
    first, *others = steps_of(data, splits, **kind)
    assert all(other == first for other in others)
    assert len(first) == batches(data, 8, **kind).steps_per_epoch


@KINDS
def test_an_epoch_has_every_record_at_most_once_and_all_but_the_remainder(kind):
    data = records(103)
    (steps,) = steps_of(data, [(8, 1, 1)], **kind)
    seen = [name for step in steps for name in step]
    assert len(seen) == len(set(seen))
    loader = batches(data, 8, **kind)
    assert loader.steps_per_epoch == loader.units_per_epoch // 8
    assert loader.left_out_per_epoch == loader.units_per_epoch % 8
    if not kind.get("packing"):
        assert len(seen) == 96 and loader.left_out_per_epoch == 7


@KINDS
def test_epochs_differ_and_repeat_with_the_seed(kind):
    data = records(103)
    (first,) = steps_of(data, [(8, 1, 1)], epoch=0, **kind)
    (second,) = steps_of(data, [(8, 1, 1)], epoch=1, **kind)
    (again,) = steps_of(data, [(8, 1, 1)], epoch=0, **kind)
    assert first == again and first != second and len(first) == len(second)
    other = [[b["record_ids"] for b in step] for step in batches(data, 8, seed=6, **kind).epoch(0)]
    assert other != [[b["record_ids"] for b in step] for step in batches(data, 8, seed=5, **kind).epoch(0)]


@KINDS
def test_resuming_in_an_epoch_gives_the_same_tensors(kind):
    loader = batches(records(103), 2, 2, rank=1, world=2, **kind)
    whole = list(loader.epoch(3))
    rest = list(loader.epoch(3, start_step=2))
    assert len(rest) == len(whole) - 2 > 0
    for step, other in zip(whole[2:], rest, strict=True):
        for batch, same in zip(step, other, strict=True):
            assert batch["record_ids"] == same["record_ids"] and torch.equal(batch["input_ids"], same["input_ids"])


def test_locate_counts_over_epochs():
    loader = batches(records(103), 8)
    assert [loader.locate(step) for step in (0, 11, 12, 30)] == [(0, 0), (0, 11), (1, 0), (2, 6)]


def test_padded_batch_is_right_padded_to_its_longest():
    data = records(20)
    (step,) = list(batches(data, 20).epoch(0))
    (batch,) = step
    by_id = {row["record_id"]: row for row in data}
    assert (
        batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (20, max(data["length"]))
    )
    assert batch["input_ids"].dtype == torch.int64
    for row, (name, task) in enumerate(zip(batch["record_ids"], batch["tasks"], strict=True)):
        source, length = by_id[name], by_id[name]["length"]
        assert task == source["task"]
        assert batch["input_ids"][row].tolist() == source["input_ids"] + [PAD] * (batch["input_ids"].shape[1] - length)
        assert batch["labels"][row, :length].tolist() == source["labels"]
        assert (batch["labels"][row, length:] == IGNORED).all()
        assert batch["attention_mask"][row].sum() == length


def test_grouping_pads_less_and_shuffles_the_steps():
    data = records(400)

    def padding(**kind):
        return sum((1 - b["attention_mask"]).sum().item() for step in batches(data, 8, **kind).epoch(0) for b in step)

    assert padding(group_by_length=True) < 0.2 * padding()
    widths = [step[0]["input_ids"].shape[1] for step in batches(data, 8, group_by_length=True).epoch(0)]
    assert widths != sorted(widths) and widths != sorted(widths, reverse=True)


def test_packed_rows_are_full():
    data = records(400)
    loader = batches(data, 4, packing=True, max_length=64)
    assert loader.units_per_epoch <= 1.03 * sum(data["length"]) / 64 + 1
    for (batch,) in loader.epoch(0):
        assert batch["input_ids"].shape[1] <= 64
        assert "attention_mask" not in batch and batch["position_ids"].shape == batch["input_ids"].shape


def test_packing_and_grouping_exclude_each_other():
    with pytest.raises(UserError, match="packing and group_by_length are both set"):
        batches(records(20), packing=True, group_by_length=True)


def test_not_one_global_batch_names_the_numbers():
    with pytest.raises(UserError) as error:
        batches(records(30), 4, 3, 0, 3)
    expected = (
        "30 training records do not fill one global batch (4 micro x 3 accumulation x 3 data-parallel = 36 global)"
    )
    assert expected in str(error.value) and "lower --global_batch_size" in str(error.value)
    with pytest.raises(
        UserError, match=r"30 training records in \d+ packed rows do not fill one global batch \(32 micro"
    ):
        batches(records(30), 32, packing=True, max_length=64)


@pytest.mark.parametrize(("count", "world", "size"), [(103, 4, 3), (5, 4, 2), (1, 3, 4), (24, 2, 6), (0, 2, 4)])
def test_evaluation_sees_every_record_once_in_equally_many_batches(count, world, size):
    data = records(max(count, 3)).select(range(count))
    ranks = [list(EvalBatches(data, size, rank, world, PAD)) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1
    assert [len(EvalBatches(data, size, rank, world, PAD)) for rank in range(world)] == [len(rank) for rank in ranks]
    everything = [batch for rank in ranks for batch in rank]
    seen = [name for batch in everything for name in batch["record_ids"] if name is not None]
    assert sorted(seen) == sorted(data["record_id"])
    labels = sum((batch["labels"] != IGNORED).sum().item() for batch in everything)
    assert labels == sum(data["trained_tokens"])
    for batch in everything:
        assert batch["input_ids"].shape[0] == size and (batch["attention_mask"].sum(1) > 0).all()
        for row, name in enumerate(batch["record_ids"]):
            if name is None:
                assert batch["tasks"][row] is None and (batch["labels"][row] == IGNORED).all()


def test_generation_prompts_are_left_padded_with_references():
    data = prepare_data(settings(str(real_data("gsm8k/train.jsonl")), max_length=512), tiny_tokenizer(), 1).validation
    ranks = [list(generation_batches(data, 3, rank, 2, PAD, max_records=10)) for rank in range(2)]
    assert [len(rank) for rank in ranks] == [2, 2]
    by_id = {row["record_id"]: row for row in data}
    seen = []
    for batch in [batch for rank in ranks for batch in rank]:
        for row, name in enumerate(batch["record_ids"]):
            if name is None:
                assert batch["references"][row] is None and batch["attention_mask"][row].sum() == 1
                continue
            seen.append(name)
            source = by_id[name]
            mask = batch["attention_mask"][row].bool()
            assert mask[-1] and torch.equal(mask.sort().values, mask)
            assert batch["input_ids"][row][mask].tolist() == source["input_ids"][: source["prompt_length"]]
            assert batch["references"][row] == source["reference"] and "####" in source["reference"]
    assert len(seen) == len(set(seen)) == 10


def test_prompts_say_what_their_answers_are_trained_to_end_with():
    data = records(4).map(lambda row: {"truncated": row["record_id"] == "x:1"})
    ends = {row["record_id"]: row["input_ids"][-1] for row in data}
    (batch,) = generation_batches(data, 8, 0, 1, PAD)
    assert batch["end_tokens"] == sorted(ends[name] for name in ("x:0", "x:2", "x:3"))
    assert len(set(ends.values())) == 4


def test_a_bounded_generation_takes_all_tasks_in_turn():
    found = [name for batch in generation_batches(records(60), 4, 0, 1, PAD, max_records=9) for name in batch["tasks"]]
    assert sorted(task for task in found if task) == ["rare"] * 3 + ["task0"] * 3 + ["task1"] * 3


def test_records_whose_answer_was_cut_away_are_not_generated():
    data = records(6).map(lambda row: {"prompt_length": 99 if row["record_id"] == "x:2" else 2})
    found = [name for batch in generation_batches(data, 4, 0, 1, PAD) for name in batch["record_ids"] if name]
    assert sorted(found) == ["x:0", "x:1", "x:3", "x:4", "x:5"]
