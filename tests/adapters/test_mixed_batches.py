"""PEFT's mixed batches: every row of one batch through the adapter that `adapter_names` gives it."""

import pytest
import torch
from peft import get_peft_model
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration

from comol_ds import track_router_load
from comol_ds.adapters.shared_down import share_down_projections
from comol_ds.serving.inference import generate
from tests.adapters.models import comol_config, tiny_llama, tokens
from tests.data.data_helpers import tiny_tokenizer
from tests.router_recount import assert_same_statistics
from tests.tiny_models import VOCABULARY, make_adapter_act

NAMES = ["first", "__base__", "second", "first", "second"]
CLOSE = {"rtol": 1e-12, "atol": 1e-12}  # everything in float64


def two_adapters(base=None, **overrides):
    """In float64: `first`, and `second` with another shape, router and targets; `first` is active."""
    torch.manual_seed(3)
    model = get_peft_model(base or tiny_llama(), comol_config(**overrides), adapter_name="first")
    other = {"r": 6, "num_experts": 2, "router": "input", "target_modules": ["q_proj", "v_proj", "up_proj"]}
    model.add_adapter("second", comol_config(**other | overrides))
    make_adapter_act(model)
    return model.double().eval()


def alone(model, name, call):
    """What `call` gives with this one adapter active, or none."""
    if name == "__base__":
        with model.disable_adapter():
            return call()
    active = model.active_adapter
    model.set_adapter(name)
    try:
        return call()
    finally:
        model.set_adapter(active)


def row_by_row(model, call):
    return torch.cat([alone(model, name, lambda row=row: call(slice(row, row + 1))) for row, name in enumerate(NAMES)])


@pytest.mark.parametrize("siblings", [False, True], ids=["each reads x", "siblings read x once"])
def test_every_row_is_what_its_adapter_gives_alone(siblings):
    model, ids = two_adapters(), tokens(5, 7)
    if siblings:
        share_down_projections(model)
    with torch.no_grad():
        expected = row_by_row(model, lambda rows: model(input_ids=ids[rows]).logits)
        found = model(input_ids=ids, adapter_names=NAMES).logits
        torch.testing.assert_close(found, expected, **CLOSE)
        # the next call is an ordinary one
        torch.testing.assert_close(
            model(input_ids=ids).logits, alone(model, "first", lambda: model(input_ids=ids).logits), **CLOSE
        )
        with model.disable_adapter():  # stands above the names
            torch.testing.assert_close(
                model(input_ids=ids, adapter_names=NAMES).logits, model(input_ids=ids).logits, **CLOSE
            )


def test_gradients_reach_the_rows_own_adapter_only():
    model, ids = two_adapters(), tokens(2, 7)
    model.base_model.set_requires_grad(["first", "second"])
    model(input_ids=ids, labels=ids, adapter_names=["first", "__base__"]).loss.backward()
    moved = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"first"}


def test_modules_trained_whole_are_mixed_too():
    model, ids = two_adapters(modules_to_save=["lm_head"]), tokens(5, 7)
    with torch.no_grad():
        for copy in model.base_model.model.lm_head.modules_to_save.values():
            copy.weight.normal_()
        expected = row_by_row(model, lambda rows: model(input_ids=ids[rows]).logits)
        torch.testing.assert_close(model(input_ids=ids, adapter_names=NAMES).logits, expected, **CLOSE)


@pytest.mark.parametrize("active", ["first", "second"])
def test_a_module_that_one_adapter_trains_whole_is_the_base_s_for_the_others(active):
    model, ids = two_adapters(), tokens(5, 7)
    model.add_adapter("third", comol_config(modules_to_save=["lm_head"]))
    model.set_adapter(active)
    model.double().eval()
    names = ["first", "third", "second", "__base__", "third"]
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["third"].weight.normal_()
        expected = [alone(model, name, lambda row=row: model(input_ids=ids[row][None]).logits)
                    for row, name in enumerate(names)]  # fmt: skip
        torch.testing.assert_close(model(input_ids=ids, adapter_names=names).logits, torch.cat(expected), **CLOSE)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"generation_config": GenerationConfig(num_beams=2, max_new_tokens=5, pad_token_id=0, eos_token_id=2)},
        {"of_model": {"num_beams": 3}},
        {},
    ],
    ids=["beams", "several answers", "from a configuration", "from the model's configuration", "greedy"],
)
def test_generation(options):
    model, ids = two_adapters(), tokens(5, 4)
    options = dict(options)
    model.generation_config.update(**options.pop("of_model", {}))
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None} | options

    def answer(rows, **names):
        mask = torch.ones_like(ids[rows])
        return model.generate(input_ids=ids[rows], attention_mask=mask, **options, **names)

    expected = row_by_row(model, answer)
    found = answer(slice(None), adapter_names=NAMES)
    assert torch.equal(found, expected)
    assert not torch.equal(found, alone(model, "first", lambda: answer(slice(None))))


def test_the_encoder_of_an_encoder_decoder_sees_each_input_once():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    base = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0))
    model = two_adapters(base, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    ids = tokens(5, 6)

    def answer(rows, **names):
        return model.generate(input_ids=ids[rows], num_beams=3, max_new_tokens=4, min_new_tokens=4, **names)

    assert torch.equal(answer(slice(None), adapter_names=NAMES), row_by_row(model, answer))


def test_statistics_are_of_the_rows_that_use_the_adapter():
    model, ids = two_adapters(), tokens(5, 7)
    mask = torch.ones_like(ids)
    mask[2:, 5:] = 0
    for name in ("first", "second"):
        own = [row for row, its in enumerate(NAMES) if its == name]
        with torch.no_grad(), track_router_load(model, name, tasks=["even"]) as load:
            load.label_rows(["even", None, "even", None, "even"])
            model(input_ids=ids, attention_mask=mask, adapter_names=NAMES)
            found = load.read("validation")
            load.label_rows([["even", None, "even", None, "even"][row] for row in own])
            alone(model, name, lambda own=own: model(input_ids=ids[own], attention_mask=mask[own]))
            expected = load.read("validation")
        assert_same_statistics(found, expected, 1e-9)


def test_answers_and_their_statistics():
    model, tokenizer = two_adapters(tiny_llama(vocab_size=VOCABULARY)), tiny_tokenizer()
    model.add_adapter("default", comol_config())
    make_adapter_act(model)
    model.double()
    prompts, options = ["one", "two and three", "four"], {"max_new_tokens": 4, "eos_token_id": None}
    answers, statistics = alone(model, "default", lambda: generate(model, tokenizer, prompts[:2], **options))
    mixed = generate(model, tokenizer, prompts, adapter_names=["default", "default", "__base__"], **options)
    assert mixed[0][:2] == answers and mixed[1]["tokens"] == statistics["tokens"]
    layer = "model.layers.1.self_attn.q_proj"
    assert mixed[1]["layers"][layer]["mean_gate"] == pytest.approx(statistics["layers"][layer]["mean_gate"], rel=1e-9)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["first"] * 4, "Length of `adapter_names` should be the same as the number of inputs, but got 4 and 5"),
        (["first"] * 4 + ["third"], r"non-existing adapter\(s\): third; there are first, second and __base__"),
    ],
)
def test_names_that_do_not_fit(names, message):
    model, ids = two_adapters(), tokens(5, 7)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with pytest.raises(ValueError, match=message):
            model(input_ids=ids, adapter_names=names)
        assert torch.equal(model(input_ids=ids).logits, expected), "the refused call left something behind"


def test_not_in_training():
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when the model is in training mode"):
        two_adapters().train()(input_ids=tokens(5, 7), adapter_names=NAMES)
