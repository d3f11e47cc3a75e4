"""The small copy of a model on which its code is tried: what must stay as in the model, and what becomes small."""

import pytest
import torch
from transformers import (
    BambaConfig,
    DeepseekV3Config,
    Gemma3Config,
    Gemma3TextConfig,
    JambaConfig,
    LlamaConfig,
    Qwen3NextConfig,
)

from comol_ds.adapters.text_model import text_model
from comol_ds.parallel.shrunken import NotShrinkable, logits_of, shrunken_copy

LLAMA_8B = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, pad_token_id=128004,
)  # fmt: skip


def layers(model) -> list:
    return list(model.get_decoder().layers)


def test_widths_shrink_together_and_numbers_of_heads_stay():
    before = LLAMA_8B.to_dict()
    copy = shrunken_copy(LLAMA_8B)
    small = copy.config
    assert (small.num_attention_heads, small.num_key_value_heads, len(layers(copy))) == (32, 8, 2)
    assert (small.hidden_size, small.head_dim, small.intermediate_size) == (256, 8, 896)
    assert (small.vocab_size, small.pad_token_id, copy.dtype) == (97, 0, torch.float32)
    assert not copy.training and not any(parameter.requires_grad for parameter in copy.parameters())
    assert LLAMA_8B.to_dict() == before


def test_it_is_the_same_copy_every_time_and_no_random_number_is_taken():
    state, ids = torch.get_rng_state(), torch.arange(9).unsqueeze(0)
    first, second = (logits_of(shrunken_copy(LLAMA_8B), input_ids=ids) for _ in range(2))
    assert torch.equal(first, second) and first.std() > 0.1
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("config", "number", "kinds"),
    [
        (JambaConfig(), 5, {"JambaMambaDecoderLayer", "JambaAttentionDecoderLayer"}),
        (DeepseekV3Config(), 4, {"DeepseekV3MLP", "DeepseekV3MoE"}),
        (Qwen3NextConfig(), 4, {"Qwen3NextGatedDeltaNet", "Qwen3NextAttention"}),
        (BambaConfig(attn_layer_indices=[3]), 4, {"BambaMixer", "BambaAttention"}),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_the_first_layers_that_hold_every_kind_stay(config, number, kinds):
    kept = layers(shrunken_copy(config))
    assert len(kept) == number
    assert kinds <= {type(module).__name__ for layer in kept for module in layer.modules()}


def test_layers_that_differ_in_a_word_only_are_of_two_kinds():
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    copy = shrunken_copy(Gemma3TextConfig(num_hidden_layers=12, layer_types=kinds * 2))
    assert copy.config.layer_types[: len(layers(copy))] == kinds


@pytest.mark.parametrize(("max_length", "window"), [(512, 512), (513, 4)])
def test_a_window_that_rows_exceed_is_exceeded_in_the_copy_too(max_length, window):
    config = Gemma3TextConfig(num_hidden_layers=2, sliding_window=512)
    assert shrunken_copy(config, max_length=max_length).config.sliding_window == window


def test_a_tower_beside_the_text_model_gets_no_memory():
    copy = shrunken_copy(Gemma3Config())
    assert {parameter.device.type for parameter in copy.model.vision_tower.parameters()} == {"meta"}
    assert {parameter.device.type for parameter in text_model(copy).parameters()} == {"cpu"}
    assert text_model(copy) is copy.model.language_model


def test_a_larger_copy_is_tried_where_one_does_not_serve():
    hidden = []
    copy = shrunken_copy(LLAMA_8B, accepts=lambda model: (hidden.append(model.config.hidden_size), len(hidden) > 1)[1])
    assert hidden == [256, 128] and copy.config.hidden_size == 128


def test_no_copy_says_why():
    with pytest.raises(NotShrinkable, match="its sizes cannot be divided"):
        shrunken_copy(LLAMA_8B, accepts=lambda model: False)
