"""Packed rows: which models keep the records of a row apart is tried; others are refused before a rank starts."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3Config,
    GptOssConfig,
    JambaConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MptConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen3_5TextConfig,
    RecurrentGemmaConfig,
)

from comol_ds.config import DataSettings, ModelSettings, OptimizerSettings, RunConfig
from comol_ds.data.collate import packed_batch, padded_batch
from comol_ds.errors import UserError
from comol_ds.training.packing_check import check_packing
from comol_ds.training.step import model_inputs
from tests.tiny_models import FAMILIES

_SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
_VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
STATE = "the record before it in a row changes what a record's logits are"
OPT = OPTConfig(vocab_size=96, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4)

LEAKING: dict[str, tuple[PreTrainedConfig, str]] = {
    "learned positions, counted along the row": (OPT, "sdpa"),
    "alibi": (BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4), "eager"),
    "alibi of its own": (MptConfig(vocab_size=96, d_model=32, n_heads=4, n_layers=2), "eager"),
    "state space": (MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2), "eager"),
    "convolution": (Lfm2Config(**_SIZES, layer_types=["conv", "full_attention"]), "sdpa"),
    "linear attention in the layer that is last of four": (
        Qwen3_5TextConfig(
            **_SIZES | {"num_hidden_layers": 4}, head_dim=8, linear_key_head_dim=8, linear_value_head_dim=8,
            linear_num_key_heads=2, linear_num_value_heads=4,
            layer_types=["full_attention", "full_attention", "full_attention", "linear_attention"],
        ),
        "sdpa",
    ),
    "recurrent": (RecurrentGemmaConfig(**_SIZES | {"num_hidden_layers": 3, "num_key_value_heads": 1}, lru_width=32),
                  "sdpa"),
    "attention that is not told the positions": (
        GptOssConfig(**_SIZES, head_dim=8, num_local_experts=4, num_experts_per_tok=2), "eager"
    ),
}  # fmt: skip
CLEAN: dict[str, PreTrainedConfig] = {
    **{name: FAMILIES[name] for name in ("llama", "llama_tied", "qwen2", "qwen3", "mistral", "gemma3")},
    "gemma3 with a vision tower": Gemma3Config(
        text_config=FAMILIES["gemma3"].to_dict(), vision_config=_VISION, mm_tokens_per_image=4
    ),
    "chunks shorter than a row": Llama4TextConfig(
        **_SIZES, head_dim=8, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=32,
        layer_types=["chunked_attention", "full_attention"],
    ),
    "of real size": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8,
    ),
}  # fmt: skip


def run_config(attn_implementation: str = "sdpa", rows: int = 8, max_length: int = 64, packing: bool = True):
    return RunConfig(
        model=ModelSettings(attn_implementation=attn_implementation),
        data=DataSettings(packing=packing, max_length=max_length),
        optimizer=OptimizerSettings(per_device_train_batch_size=rows),
    )


@pytest.mark.parametrize("name", LEAKING)
def test_a_model_whose_records_leak_is_refused(name):
    config, attention = LEAKING[name]
    with pytest.raises(UserError) as error:
        check_packing(config, run_config(attention))
    assert str(error.value) == (
        f"--packing with model type '{config.model_type}': {STATE}; train without --packing, --group_by_length puts"
        " records of similar length together"
    )


@pytest.mark.parametrize("name", CLEAN)
def test_a_model_that_keeps_records_apart_is_packed(name):
    before = CLEAN[name].to_dict()
    check_packing(CLEAN[name], run_config())
    assert CLEAN[name].to_dict() == before


@pytest.mark.parametrize("config", [OPT, FAMILIES["llama"]], ids=lambda config: config.model_type)
def test_the_small_copy_decides_what_the_model_itself_shows(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    records = [
        {"input_ids": ids, "labels": ids, "record_id": None, "task": None}
        for ids in torch.randint(3, 96, (2, 12)).tolist()
    ]
    with torch.no_grad():
        packed, alone = (
            model(**model_inputs(batch, torch.device("cpu"))).logits[0, -12:]
            for batch in (packed_batch([records], 0), padded_batch(records[1:], 0))
        )
    try:
        check_packing(config, run_config())
        refused = False
    except UserError:
        refused = True
    assert refused == (not torch.allclose(packed, alone, atol=1e-5))


def test_without_packing_nothing_is_tried():
    check_packing(OPT, run_config(packing=False))


def test_flash_attention_keeps_records_apart_in_single_rows_only():
    for config in (FAMILIES["llama"], Gemma2Config(**_SIZES, head_dim=8)):  # Gemma 2 has no sdpa
        check_packing(config, run_config("flash_attention_2", rows=1))
    with pytest.raises(UserError) as error:
        check_packing(FAMILIES["llama"], run_config("flash_attention_2", rows=2))
    assert str(error.value) == (
        "--packing with --attn_implementation flash_attention_2 keeps records apart in batches of one row, not of"
        " --per_device_train_batch_size 2; use 1 and a longer --max_length, or --attn_implementation sdpa"
    )


def test_a_model_that_cannot_be_tried_is_refused_with_the_reason():
    config = JambaConfig(**_SIZES, attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_expand=0)
    with pytest.raises(UserError, match=r"--packing with model type 'jamba': cannot be tried on a small copy of it: ."):
        check_packing(config, run_config())
