"""Models and adapters that tensor parallelism cannot split, and the sizes that work."""

from dataclasses import replace

import pytest
from torch import nn
from transformers import PreTrainedModel

from comol_ds.config import AdapterSettings
from comol_ds.errors import UserError
from comol_ds.layout import either
from comol_ds.parallel.tp_plan import check_placement, place_linears
from tests.settings.meta_models import llama, on_meta
from tests.tiny_models import FAMILIES


def refusal(model: PreTrainedModel, tensor_parallel: int, adapter: AdapterSettings | None = None) -> str:
    with pytest.raises(UserError) as error:
        check_placement(model, place_linears(model, None), tensor_parallel, adapter or AdapterSettings())
    return str(error.value)


@pytest.mark.parametrize(("family", "working"), [("llama", [2]), ("qwen3_gqa4", [2, 4]), ("llama_odd_vocabulary", [2])])
def test_models_that_can_be_split(family, working):
    model = on_meta(FAMILIES[family])
    for tensor_parallel in working:
        assert check_placement(model, place_linears(model, None), tensor_parallel, AdapterSettings()) is None
    assert refusal(model, 16).endswith(f"; use {either(working)}")


@pytest.mark.parametrize(
    ("changes", "tensor_parallel", "fault"),
    [
        ({}, 3, " does not divide num_attention_heads = 4; use 2"),
        ({}, 4, " does not divide num_key_value_heads = 2; use 2"),
        ({"num_key_value_heads": 1}, 2, " does not divide num_key_value_heads = 1; use 1"),
        (
            {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 12},
            8,
            " does not divide num_attention_heads = 12; use 2, 3, 4, 6 or 12",
        ),
        (
            {"num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 20},
            8,
            " does not divide out_features of model.layers.0.mlp.gate_proj = 20; use 2 or 4",
        ),
        ({"num_key_value_heads": 4, "vocab_size": 3}, 4, ": the vocabulary has 3 rows, fewer than ranks; use 2"),
    ],
    ids=str,
)
def test_sizes_that_cannot_be_divided(changes, tensor_parallel, fault):
    assert refusal(llama(**changes), tensor_parallel) == f"--tensor_parallel_size {tensor_parallel}{fault}"


def test_dropout_between_sharded_layers():
    assert refusal(llama(attention_dropout=0.1), 2) == (
        "--tensor_parallel_size 2: attention_dropout is 0.1 and the ranks would draw the same mask for different parts;"
        " set it to 0 in the model's config.json"
    )


def test_quantized_weights():
    model = llama()
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    assert refusal(model, 2) == (
        "--tensor_parallel_size 2: quantized weights cannot be sharded; use a model without quantization_config"
    )


def test_modules_trained_whole():
    assert refusal(llama(), 2, replace(AdapterSettings(), modules_to_save=["lm_head", "norm"])) == (
        "--modules_to_save lm_head norm with --tensor_parallel_size 2: modules trained whole are not supported; drop it"
        " or use --tensor_parallel_size 1"
    )


def test_embedding_and_head_that_cannot_be_split_over_the_vocabulary():
    class Head(nn.Module):
        weight = None

    model = llama()
    model.lm_head = Head()
    assert refusal(model, 2) == (
        "--tensor_parallel_size 2: the output head is a Head, only an nn.Linear can be split over the vocabulary; use"
        " --tensor_parallel_size 1"
    )
    for embedding in (nn.EmbeddingBag(96, 32), nn.Embedding(96, 32, max_norm=1.0)):
        model = llama()
        model.set_input_embeddings(embedding)
        assert refusal(model, 2) == (
            f"--tensor_parallel_size 2: the input embedding is a {type(embedding).__name__}, only an nn.Embedding"
            " without max_norm can be split over the vocabulary; use --tensor_parallel_size 1"
        )
