"""Tensor-parallel peers that see other batches or hold other replicas stop the run, on every rank, by name."""

import json
from pathlib import Path

import pytest

from tests.distributed.launching import run_deepspeed
from tests.tiny_models import save_tiny_model

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
STAGES = ("zero0", "zero2", "zero3")
LAYER = "base_model.model.model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def reports(tmp_path_factory, extensions):
    """What the four ranks of TP2 x DP2 were told: part -> situation -> message or None."""
    folder = tmp_path_factory.mktemp("consistency")
    save_tiny_model(folder / "llama")
    worker = Path(__file__).parent / "consistency_worker.py"
    run = run_deepspeed(4, worker, [str(folder), str(folder)], extensions)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(4)]


def said(reports: list[dict], part: str, situation: str) -> str | None:
    """The message, which must be the same on all ranks: one that goes on alone would wait for the others."""
    messages = {report[part][situation] for report in reports}
    assert len(messages) == 1
    return messages.pop()


def batches_message(ranks: str, who: str) -> str:
    return (
        f"tensor-parallel ranks {ranks} see different batches at step 1: {who}. They share one copy of the model and"
        " must read the same records: look for data files, caches or settings that differ between the ranks"
    )


def replicas_message(ranks: str, who: str, count: int, first: str, more: str = "") -> str:
    return (
        f"tensor-parallel ranks {ranks} hold different copies of replicated parameters at step 2: {who} in {count} of"
        f" 42 parameters, first {LAYER}.{first}.default{more}. Faulty hardware or a non-deterministic kernel may be the"
        " cause; resume from the last checkpoint"
    )


@pytest.mark.parametrize("situation", ["own records on data-parallel peers", "other order of the keys"])
def test_the_same_batches_within_each_group_pass(reports, situation):
    assert said(reports, "batches", situation) is None


@pytest.mark.parametrize(
    ("situation", "ranks", "who"),
    [
        ("another token on rank 1", "0, 1", "rank 1 differs from rank 0"),
        ("another record id on rank 3", "2, 3", "rank 3 differs from rank 2"),
        ("another dtype on rank 0", "0, 1", "rank 1 differs from rank 0"),
        (
            "the first micro-batch only on ranks 1 and 3",
            "0, 1",
            "rank 1 differs from rank 0 (and 1 more group)",
        ),
        ("rank 0 alone among four", "0, 1, 2, 3", "rank 0 differs from ranks 1, 2, 3"),
    ],
)
def test_other_batches_within_a_group_are_reported_on_all_ranks(reports, situation, ranks, who):
    assert said(reports, "batches", situation) == batches_message(ranks, who)


@pytest.mark.parametrize("stage", STAGES)
def test_replicas_are_bit_equal_after_training(reports, stage):
    assert said(reports, stage, "after training") is None
    assert said(reports, stage, "all undone") is None


@pytest.mark.parametrize("stage", STAGES)
def test_one_ulp_in_a_replicated_parameter_is_reported(reports, stage):
    expected = replicas_message("2, 3", "rank 3 differs from rank 2", 1, "comol_cores")
    assert said(reports, stage, "replicated parameter, rank 3") == expected


@pytest.mark.parametrize("stage", STAGES)
def test_differing_parameters_and_groups_are_counted(reports, stage):
    expected = replicas_message("0, 1", "rank 1 differs from rank 0", 3, "comol_B", " (and 1 more group)")
    assert said(reports, stage, "three replicated parameters, ranks 1 and 3") == expected


@pytest.mark.parametrize("stage", STAGES)
def test_sharded_parameters_may_differ(reports, stage):
    assert said(reports, stage, "sharded parameter, rank 3") is None


def test_padding_behind_a_zero3_partition_may_differ_but_not_the_number_before_it(reports):
    assert said(reports, "zero3", "behind the partition, rank 3") is None
    expected = replicas_message("2, 3", "rank 3 differs from rank 2", 1, "comol_cores")
    assert said(reports, "zero3", "the partition's last number, rank 3") == expected


def test_nothing_is_sent_without_tensor_parallelism(reports):
    assert reports[0]["alone"] is None, "rank 0 checked while the other ranks did not"
