"""Checkpointing, offload and partitioning on two ranks: each trains what keeping everything trains, and keeps less."""

import dataclasses

import pytest
import torch
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM

from comol_ds.parallel.assemble import attach_adapter
from tests.distributed.equality_cases import (
    ACTIVATION_CASES,
    ACTIVATION_DROPOUT_CASES,
    ACTIVATION_DROPOUT_VARIATIONS,
    ACTIVATION_VARIATIONS,
    BESIDE_NOTHING,
    Case,
)
from tests.distributed.one_process import assert_equal_training, assert_equals_one_process
from tests.distributed.suites import suite_trainer
from tests.tiny_models import FAMILIES, random_batch

pytestmark = pytest.mark.distributed
LLAMA = FAMILIES["llama"]


def runs(cases: list[Case], further: list[Case]) -> list:
    marks = pytest.mark.exhaustive
    return [
        *(pytest.param("activations", case, id=case.name, marks=pytest.mark.slow) for case in cases),
        *(pytest.param("activations-variations", case, id=case.name, marks=marks) for case in further),
    ]


@pytest.fixture(scope="module")
def trained(models, tmp_path_factory, extensions):
    ranks = {"activations": 2, "activations-variations": 2}
    return suite_trainer("activation_worker.py", ranks, models, tmp_path_factory, extensions)


@pytest.fixture(scope="module")
def measured(trained):
    """What each of the two ranks measured."""
    return [torch.load(trained("activations") / f"measured_{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize(("suite", "case"), runs(ACTIVATION_CASES, ACTIVATION_VARIATIONS))
def test_equals_one_process(suite, case, trained, models):
    assert_equals_one_process(torch.load(trained(suite) / f"{case.name}.pt"), case, str(models))


def keeping_all(case: Case) -> Case:
    return dataclasses.replace(case, checkpointing="none", offload="none", partition=False)


@pytest.mark.parametrize(
    ("suite", "case"),
    [
        run
        for run in runs(ACTIVATION_DROPOUT_CASES, ACTIVATION_DROPOUT_VARIATIONS)
        if run.values[1] != keeping_all(run.values[1])
    ],
)
def test_dropout_draws_the_masks_of_keeping_all(suite, case, trained):
    """The reference is trained in the same suite or, at ZeRO-3 with tensor parallelism, in the default one."""
    found = torch.load(trained(suite) / f"{case.name}.pt")
    expected = torch.load(trained(suite) / f"{keeping_all(case).name}.pt")
    assert_equal_training(found, expected)
    assert found["load"]["layers"].keys() == expected["load"]["layers"].keys()
    for layer, share in found["load"]["layers"].items():
        assert share["mean_gate"] == pytest.approx(expected["load"]["layers"][layer]["mean_gate"], rel=1e-5)


@pytest.mark.slow
def test_partitioned_inputs_are_half_on_each_of_two_ranks(measured):
    tokens = random_batch(4, seed=0)["input_ids"].numel()
    inputs = LLAMA.num_hidden_layers * tokens * LLAMA.hidden_size * 4
    for rank in measured:
        saved = rank["kept"]["full"] - rank["kept"]["partitioned"]
        assert 0 <= inputs // 2 - saved < 100, "DeepSpeed keeps a few numbers beside each input"
        assert rank["kept"]["full"] < rank["kept"]["none"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["torch.float64", "torch.float32", "torch.bfloat16"])
def test_loss_split_over_an_uneven_vocabulary(dtype, measured):
    for rank in measured:
        loss = rank["losses"][dtype]
        assert loss["found"][5].isnan(), "an id outside the vocabulary"
        torch.testing.assert_close(loss["found"].nan_to_num(), loss["expected"])
        torch.testing.assert_close(loss["gradient"], loss["expected_gradient"].to(loss["gradient"].dtype))
    assert torch.equal(*(rank["losses"][dtype]["found"].nan_to_num() for rank in measured))


@pytest.mark.slow
@pytest.mark.parametrize("case", BESIDE_NOTHING, ids=lambda case: case.name)
def test_micro_batches_without_any_label_change_nothing(case, trained, models):
    """The head then computes no logits at all, on one data-parallel rank or on all tensor-parallel ones."""
    config = case.run_config(str(models))
    base = AutoModelForCausalLM.from_pretrained(config.model.model_name_or_path, dtype=torch.float32)
    model = attach_adapter(base, config.adapter, config.run.seed)
    batch = random_batch(2, seed=1)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].flatten(0, 1)
    targets = batch["labels"][:, 1:].flatten()
    loss_sum = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    (loss_sum / (targets != -100).sum()).backward()
    norm = clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    found = torch.load(trained("activations") / f"{case.name}.pt")
    assert found == pytest.approx((loss_sum.item(), norm.item()), rel=1e-5)
