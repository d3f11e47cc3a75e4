"""`track_router_load` on a plain PEFT model: in loops of one's own, in generation, and under transformers' Trainer."""

import json

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from comol_ds import CoMoLConfig, track_router_load
from comol_ds.adapters.comol_layer import CoMoLLinear
from comol_ds.router_load.trainer_callback import RouterLoadCallback
from tests.router_recount import Recount, assert_same_statistics
from tests.tiny_models import FAMILIES, left_padded, make_adapter_act, random_batch, random_packed_batch

CLOSE = 1e-9  # everything in float64
FIELDS = ("input_ids", "attention_mask", "labels", "position_ids")


@pytest.fixture
def model():
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_config(FAMILIES["llama"])
    adapted = get_peft_model(
        base, CoMoLConfig(r=4, lora_alpha=4, num_experts=3, target_modules=["q_proj", "down_proj"])
    )
    make_adapter_act(adapted)
    return adapted.double().train()


def inputs(batch: dict) -> dict:
    return {name: batch[name] for name in FIELDS if name in batch} | {"use_cache": False}


@pytest.mark.parametrize("make", [lambda: random_batch(4, 1), lambda: left_padded(random_batch(4, 2))])
def test_a_training_step_with_recomputation(model, make):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    batch = make()
    recount = Recount(model)
    with track_router_load(model, tasks=["even", "odd"]) as load:
        load.label_rows(batch["tasks"])
        model(**inputs(batch)).loss.backward()
        found = load.read()
    expected = recount.statistics([batch], [batch["record_index"] >= 0])
    assert_same_statistics(found, expected, CLOSE)


def test_completion_only(model):
    batch = random_packed_batch(3, 4)
    recount = Recount(model)
    with track_router_load(model, completion_only=True) as load:
        model(**inputs(batch))
        found = load.read()
    expected = recount.statistics([batch | {"tasks": ["all"] * 6}], [batch["labels"] != -100])
    assert found["tokens"] == {"all": int((batch["labels"] != -100).sum())}
    for layer, values in found["layers"].items():
        assert values["mean_gate"] == pytest.approx(expected["layers"][layer]["mean_gate"], rel=CLOSE)


def test_rows_without_a_label_and_passes_in_evaluation_mode_stand_apart(model):
    batch = random_batch(4, 5)
    with track_router_load(model, tasks=["even"]) as load:
        load.label_rows(["even", None, "unheard of", "even"])
        model(**inputs(batch))
        model.eval()
        model(**inputs(batch))  # labels hold for one pass
        trained, evaluated = load.read("train"), load.read("validation")
        assert load.read("train") is None
    lengths = batch["attention_mask"].sum(1).tolist()
    assert trained["tokens"] == {"all": sum(lengths), "even": lengths[0] + lengths[3], "other": lengths[1] + lengths[2]}
    assert evaluated["tokens"] == {"all": sum(lengths), "other": sum(lengths)}


def test_generation_counts_every_token_once(model):
    model.eval()
    batch = left_padded(random_batch(3, 6))
    prompts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    new = 5
    with track_router_load(model) as load:
        output = model.generate(**prompts, max_new_tokens=new, min_new_tokens=new, do_sample=False, eos_token_id=None)
        found = load.read("validation")
    assert output.shape[1] == batch["input_ids"].shape[1] + new
    # the last token is not fed back; the cache spares the earlier ones a second pass
    assert found["tokens"] == {"all": int(batch["attention_mask"].sum()) + 3 * (new - 1)}
    assert all(sum(values["mean_gate"]) == pytest.approx(1, abs=1e-6) for values in found["layers"].values())


def test_no_hook_is_left(model):
    with track_router_load(model):
        pass
    hooks = [module._forward_hooks or module._forward_pre_hooks for module in model.modules()]
    assert not any(hooks)
    with pytest.raises(KeyError), track_router_load(model):
        raise KeyError
    assert not any(module._forward_hooks for module in model.modules())


def test_bad_calls_are_named(model):
    batch = random_batch(2, 7)
    plain = AutoModelForCausalLM.from_config(FAMILIES["llama"])
    with (
        pytest.raises(ValueError, match="the model has no CoMoL layer with an adapter named 'default'"),
        track_router_load(plain),
    ):
        pass
    with track_router_load(model, completion_only=True) as load:
        with pytest.raises(ValueError, match="this call of the model has no labels"):
            model(input_ids=batch["input_ids"])
        load.label_rows(["one"])
        with pytest.raises(ValueError, match="label_rows named 1 tasks for a batch of 2 rows"):
            model(**inputs(batch))


def test_trainer_callback_writes_a_line_per_log_and_evaluation(model, tmp_path):
    batch = random_batch(8, 8)
    rows = Dataset.from_dict({name: batch[name].tolist() for name in ("input_ids", "attention_mask", "labels")})
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=4,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=4,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
    )
    Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=[RouterLoadCallback()]).train()
    lines = [json.loads(line) for line in (tmp_path / "router_load.jsonl").read_text().splitlines()]
    assert [(line["step"], line["split"]) for line in lines] == [(2, "train"), (4, "train"), (4, "validation")]
    tokens = int(batch["attention_mask"].sum())
    # 2 steps of 2 micro-batches of 2 rows are all 8 rows once; recomputation does not count
    assert [line["tokens"]["all"] for line in lines] == [tokens, tokens, tokens]
    layers = [name.removeprefix("base_model.model.") for name, m in model.named_modules() if isinstance(m, CoMoLLinear)]
    assert all(list(line["layers"]) == layers and line["version"] == 1 for line in lines)
