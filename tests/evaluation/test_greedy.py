"""Greedy answers are the argmax of every step, whatever the base's generation configuration recommends."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from comol_ds.config import AdapterSettings
from comol_ds.evaluation.greedy import plain_generation
from comol_ds.parallel.assemble import attach_adapter
from comol_ds.serving.inference import generate
from tests.data.data_helpers import tiny_tokenizer
from tests.hostile_generation import HOSTILE, hostile_values
from tests.tiny_models import FAMILIES, make_adapter_act

PROMPTS = ["How many is 1 and one?", "How many is 22 and one one one?"]
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(2)
    base = AutoModelForCausalLM.from_config(FAMILIES["llama"])
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(4)
    adapted = attach_adapter(base, AdapterSettings(r=4, num_experts=2), seed=0)
    make_adapter_act(adapted)
    return adapted.eval()


@pytest.fixture
def configured(model):
    """The base's generation configuration, to be changed."""
    base, kept = model.get_base_model(), model.get_base_model().generation_config
    base.generation_config = GenerationConfig.from_dict(kept.to_dict())
    yield base.generation_config
    base.generation_config = kept


@torch.no_grad()
def argmax(model, prompt: str, ends: set[int]) -> list[int]:
    """The answer's ids, one forward without a cache each."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    while len(ids) < start + NEW_TOKENS and (len(ids) == start or ids[-1] not in ends):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[start:]


def expected(model, ends: set[int]) -> list[str]:
    return [tiny_tokenizer().decode(argmax(model, prompt, ends), skip_special_tokens=True) for prompt in PROMPTS]


def answers(model, **options) -> list[str]:
    return generate(model, tiny_tokenizer(), PROMPTS, max_new_tokens=NEW_TOKENS, **options)[0]


def test_no_setting_of_the_base_changes_an_answer(model, configured):
    greedy = expected(model, {2})
    for name, value in hostile_values(configured):
        kept = getattr(configured, name)
        setattr(configured, name, value)
        assert answers(model) == greedy, name
        assert getattr(configured, name) is value, "the base's configuration is its own again"
        setattr(configured, name, kept)


@pytest.mark.parametrize("name", HOSTILE)
def test_the_hostile_values_are_hostile(model, configured, name):
    batch = tiny_tokenizer()(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    plain = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)
    setattr(configured, name, HOSTILE[name])
    changed = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert not torch.equal(plain, changed)


def test_ends_of_turn_of_the_base_end_an_answer(model, configured):
    second = argmax(model, PROMPTS[0], {2})[1]
    configured.eos_token_id = [2, second]
    assert answers(model) == expected(model, {2, second}) != expected(model, {2})
    configured.eos_token_id = None
    assert answers(model) == expected(model, {2})


def test_options_of_the_caller_hold(model, configured):
    configured.repetition_penalty = 3.0
    banned = argmax(model, PROMPTS[0], {2})[0]
    assert answers(model, suppress_tokens=[banned]) != expected(model, {2})
    torch.manual_seed(0)
    configured.temperature, configured.repetition_penalty = 1e-3, 1.0
    assert answers(model, do_sample=True) == expected(model, {2}), "a sampler keeps the base's temperature"


def test_a_configuration_of_the_wrapper_comes_back_too(model, configured):
    model.generation_config = GenerationConfig(repetition_penalty=5.0)
    try:
        with plain_generation(model, tiny_tokenizer()) as ends:
            assert ends == [2] and model.generation_config.repetition_penalty is None
        assert model.generation_config.repetition_penalty == 5.0
        assert answers(model) == expected(model, {2})
    finally:
        del model.generation_config
