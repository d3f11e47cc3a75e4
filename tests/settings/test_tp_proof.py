"""Plans of tensor parallelism tried before use: what ranks compute on slices is what the whole model computes."""

import json

import pytest
from transformers import (
    Gemma2Config,
    Gemma3Config,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    StableLmConfig,
)

from comol_ds.errors import UserError
from comol_ds.parallel.tp_plan import place_linears
from comol_ds.parallel.tp_proof import placement_fault, prove_placement
from tests.settings.meta_models import SIZES, on_meta
from tests.tiny_models import FAMILIES

VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
OWN_PLANS: list[tuple[PreTrainedConfig, int]] = [
    *((config, 2) for config in FAMILIES.values()),
    *((FAMILIES[name], 4) for name in ("llama_gqa4", "llama_gqa8", "qwen3_gqa4")),  # as many key-value heads as ranks
    (FAMILIES["llama_gqa8"], 8),
    (GemmaConfig(**SIZES), 2),
    (Gemma2Config(**SIZES, attention_dropout=0.0), 2),
    (Gemma3Config(text_config=FAMILIES["gemma3"].to_dict(), vision_config=VISION, mm_tokens_per_image=4), 2),
    (GPTNeoXConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4), 2),
    (
        LlamaConfig(
            vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=4, num_attention_heads=32,
            num_key_value_heads=8,
        ),
        8,
    ),
]  # fmt: skip
TINY = {name: size for name, size in SIZES.items() if name != "head_dim"}
ATTENTION = {f"self_attn.{name}_proj": "colwise" for name in "qkv"}
MLP = {"mlp.gate_proj": "colwise", "mlp.up_proj": "colwise", "mlp.down_proj": "rowwise"}
OPT = OPTConfig(vocab_size=96, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4)


@pytest.mark.parametrize(("config", "ranks"), OWN_PLANS, ids=lambda value: getattr(value, "model_type", value))
def test_the_models_own_plan_serves(config, ranks):
    model = on_meta(config)
    assert placement_fault(config, place_linears(model, None), ranks, model.config._attn_implementation) is None


def test_flash_attention_is_tried_without_a_gpu_for_a_model_that_has_no_sdpa():
    config = Gemma2Config(**SIZES, attention_dropout=0.0)
    assert placement_fault(config, place_linears(on_meta(config), None), 2, "flash_attention_2") is None


@pytest.mark.parametrize(
    ("config", "plan", "fault"),
    [
        (
            # view(rows, -1, heads, size): with an even number of tokens it would be another view of as many numbers
            OPT,
            ATTENTION | {"self_attn.out_proj": "rowwise"},
            "model.decoder.layers.0.self_attn fails on slices: shape '[2, -1, 4, 8]' is invalid for input of size 352",
        ),
        (
            # a norm over all heads
            Olmo2Config(**TINY),
            ATTENTION | {"self_attn.o_proj": "rowwise"} | MLP,
            "model.layers.0.self_attn.q_norm fails on slices: The size of tensor a (32) must match the size of tensor b"
            " (16) at non-singleton dimension 2",
        ),
        (
            StableLmConfig(**TINY),
            ATTENTION | {"self_attn.o_proj": "rowwise"} | MLP,
            "model.layers.0.self_attn fails on slices: shape '[2, 11, 4, 8]' is invalid for input of size 352",
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_a_plan_that_the_models_code_does_not_follow_is_refused(config, plan, fault, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan), encoding="utf-8")
    model = on_meta(config)
    with pytest.raises(UserError) as error:
        prove_placement(model, place_linears(model, str(path)), 2, "sdpa", str(path))
    assert str(error.value) == (
        f"--tp_plan {path} does not serve 2 ranks: {fault}; leave these layers out of the plan or use"
        " --tensor_parallel_size 1"
    )


@pytest.mark.parametrize(
    ("config", "plan"), [(OPT, {"fc1": "colwise", "fc2": "rowwise"}), (Olmo2Config(**TINY), MLP)], ids=["opt", "olmo2"]
)
def test_the_part_of_a_plan_that_the_code_follows_serves(config, plan, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan), encoding="utf-8")
    assert placement_fault(config, place_linears(on_meta(config), str(path)), 2) is None


def test_other_arithmetic_on_slices_is_found_where_it_first_shows():
    """A slice of Phi-3's [gate; up] is all gate or all up; halves of it have the widths that the code expects."""
    placement = {"model.layers.0.mlp.gate_up_proj": "column", "model.layers.0.mlp.down_proj": "row"}
    fault = placement_fault(Phi3Config(**TINY), placement, 2)
    assert fault == "the output of model.layers.0.mlp.down_proj is not the whole model's"


def test_a_placement_of_some_layers_is_tried_in_all():
    placement = {
        f"model.layers.8.self_attn.{name}_proj": kind
        for name, kind in {"q": "column", "k": "column", "v": "column", "o": "row"}.items()
    }
    assert "q_norm fails on slices" in placement_fault(Olmo2Config(**TINY | {"num_hidden_layers": 9}), placement, 2)
