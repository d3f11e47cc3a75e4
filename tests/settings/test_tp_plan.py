"""Plans of tensor parallelism: which Linear is placed how, and what a plan must not do."""

import json

import pytest
from transformers import (
    DogeConfig,
    Gemma2Config,
    Gemma3Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
)

from comol_ds.adapters import expressions
from comol_ds.config import AdapterSettings
from comol_ds.errors import UserError
from comol_ds.parallel.tp_plan import check_placement, place_linears
from tests.settings.meta_models import SIZES, llama, on_meta
from tests.tiny_models import FAMILIES

MODELS = FAMILIES | {"gemma": GemmaConfig(**SIZES), "gemma2": Gemma2Config(**SIZES)}
ONE_LAYER = {
    "self_attn.q_proj": "column", "self_attn.k_proj": "column", "self_attn.v_proj": "column",
    "self_attn.o_proj": "row", "mlp.gate_proj": "column", "mlp.up_proj": "column", "mlp.down_proj": "row",
}  # fmt: skip
EXAMPLE = '{"layers.*.up_proj": "colwise", "layers.*.down_proj": "rowwise"}'


@pytest.fixture
def plan_file(tmp_path):
    """Writes a plan and returns its path."""

    def write(plan) -> str:
        path = tmp_path / "plan.json"
        path.write_text(plan if isinstance(plan, str) else json.dumps(plan), encoding="utf-8")
        return str(path)

    return write


@pytest.mark.parametrize("family", MODELS)
def test_the_models_own_plan_places_every_linear_but_the_head(family):
    placed = place_linears(on_meta(MODELS[family]), None)
    assert placed == {f"model.layers.{layer}.{name}": kind for layer in range(2) for name, kind in ONE_LAYER.items()}


def test_a_vision_tower_stays_whole():
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    model = on_meta(Gemma3Config(text_config=FAMILIES["gemma3"].to_dict(), vision_config=vision, mm_tokens_per_image=4))
    placed = place_linears(model, None)
    assert placed == {
        f"model.language_model.layers.{layer}.{name}": kind for layer in range(2) for name, kind in ONE_LAYER.items()
    }
    check_placement(model, placed, 2, AdapterSettings())
    with pytest.raises(UserError, match="does not divide num_key_value_heads = 2; use 2"):
        check_placement(model, placed, 4, AdapterSettings())


def test_a_plan_file_replaces_the_models_own(plan_file):
    path = plan_file({"layers.*.mlp.up_proj": "colwise", "mlp.gate_proj": "ColWise", "mlp.down_proj": "rowwise"})
    names = {"mlp.up_proj", "mlp.gate_proj", "mlp.down_proj"}
    assert place_linears(llama(), path) == {
        f"model.layers.{layer}.{name}": kind for layer in range(2) for name, kind in ONE_LAYER.items() if name in names
    }


def test_a_plan_file_serves_a_model_without_a_plan(plan_file):
    config = OPTConfig(
        vocab_size=96, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4, word_embed_proj_dim=32
    )
    attention = {f"self_attn.{name}_proj": "colwise" for name in "qkv"} | {"self_attn.out_proj": "rowwise"}
    placed = place_linears(on_meta(config), plan_file(attention | {"fc1": "colwise", "fc2": "rowwise"}))
    assert {name.removeprefix("model.decoder.layers.0."): kind for name, kind in placed.items()} == {
        "self_attn.q_proj": "column", "self_attn.k_proj": "column", "self_attn.v_proj": "column",
        "self_attn.out_proj": "row", "fc1": "column", "fc2": "row",
    }  # fmt: skip


MLP = {"mlp.gate_proj": "colwise", "mlp.up_proj": "colwise", "mlp.down_proj": "rowwise"}


@pytest.mark.parametrize("style", ["colwise", "colwise_rep", "colwise_gather_output"])
def test_head_and_embedding_may_be_named_and_are_not_placed(style, plan_file):
    plan = {"embed_tokens": "embedding_rowwise", "lm_head": style, "model.norm": "replicated_with_grad_allreduce"}
    assert len(place_linears(llama(), plan_file(plan | MLP))) == 6


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("{", " is not valid JSON: line 1: Expecting property name enclosed in double quotes; repair the file"),
        ([1], f" must hold a JSON object of pattern and style, like {EXAMPLE}"),
        ({}, f" must hold a JSON object of pattern and style, like {EXAMPLE}"),
        ({"up_proj": 1}, f" must hold a JSON object of pattern and style, like {EXAMPLE}"),
        (
            MLP | {"o_proj": "rowise"},
            ": style 'rowise' of 'o_proj' is not supported; the accepted ones are colwise, rowwise, embedding_rowwise,"
            " replicated_with_grad_allreduce",
        ),
        (
            MLP | {"wo": "rowwise"},
            ": 'wo' matches no module with a weight; correct it or remove it",
        ),
        (
            MLP | {"qk_norm": "replicated_with_grad_allreduce"},
            ": 'qk_norm' matches no module with a weight; correct it or remove it",
        ),
        (
            MLP | {"up_proj(": "colwise"},
            ": 'up_proj(' is no pattern of names; write names, dots and *: missing ), unterminated subpattern at"
            " position 9",
        ),
        (
            MLP | {"embed_tokens": "rowwise"},
            ": 'embed_tokens' matches model.embed_tokens, a Embedding; only nn.Linear can be rowwise, remove it",
        ),
        (
            MLP | {"input_layernorm": "colwise"},
            ": 'input_layernorm' matches model.layers.0.input_layernorm, a LlamaRMSNorm; only nn.Linear can be colwise,"
            " remove it",
        ),
        (
            MLP | {"q_proj": "colwise_gather_output"},
            ": 'q_proj' gathers the output of model.layers.0.self_attn.q_proj (colwise_gather_output), which is"
            " supported for the output head only; use colwise, and rowwise for the layer after it",
        ),
        (
            MLP | {"layers.1.mlp.up_proj": "rowwise"},
            ": 'mlp.up_proj' and 'layers.1.mlp.up_proj' place model.layers.1.mlp.up_proj differently; remove one",
        ),
        (
            {"lm_head": "colwise"},
            f" shards no Linear layer; write one like {EXAMPLE}",
        ),
        (
            {"mlp.gate_proj": "colwise", "mlp.up_proj": "colwise"},
            " shards model.layers.0.mlp.gate_proj by column and nothing in 'model.layers.0.mlp' by row; place the row"
            " half too",
        ),
        (
            MLP | {"self_attn.o_proj": "rowwise"},
            " shards model.layers.0.self_attn.o_proj by row and nothing in 'model.layers.0.self_attn' by column; place"
            " the column half too",
        ),
        (
            {"mlp.gate_proj": "colwise", "mlp.down_proj": "rowwise"},
            " leaves model.layers.0.mlp.up_proj whole beside sharded layers and would mix slices with the whole; place"
            " it too or use --tensor_parallel_size 1",
        ),
    ],
    ids=str,
)
def test_plan_file_that_is_refused(plan, message, plan_file):
    path = plan_file(plan)
    with pytest.raises(UserError) as error:
        place_linears(llama(), path)
    assert str(error.value) == f"--tp_plan {path}{message}"


def test_plan_file_that_cannot_be_read(tmp_path):
    path = tmp_path / "plan.json"
    with pytest.raises(UserError) as error:
        place_linears(llama(), str(path))
    assert str(error.value) == f"--tp_plan {path}: No such file or directory; check the path"
    path.write_bytes(b'{"\xff": "colwise"}')
    with pytest.raises(UserError) as error:
        place_linears(llama(), str(path))
    assert str(error.value) == f"--tp_plan {path} is not UTF-8 text (byte 2); convert the file"


TINY = {name: size for name, size in SIZES.items() if name != "head_dim"}
REPLACE = "give another plan with --tp_plan FILE or use --tensor_parallel_size 1"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=4, n_positions=64),
            f"model type 'gpt2' has no tensor-parallel plan; write one like {EXAMPLE} and give it with --tp_plan FILE,"
            " or use --tensor_parallel_size 1",
        ),
        (
            Phi3Config(**TINY),
            "the tensor-parallel plan of model type 'phi3': style 'rowwise_split_input' of"
            f" 'model.layers.*.self_attn.o_proj' is not supported; {REPLACE}",
        ),
        (
            MixtralConfig(**TINY),
            "the tensor-parallel plan of model type 'mixtral': style 'packed_colwise' of"
            f" 'model.layers.*.mlp.experts.gate_up_proj' is not supported; {REPLACE}",
        ),
        (
            # its plan names modules that a model without experts does not have
            DogeConfig(**TINY),
            "the tensor-parallel plan of model type 'doge': 'model.layers.*.mlp.router_gate' matches no module with a"
            f" weight; {REPLACE}",
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_model_whose_own_plan_does_not_serve(config, message):
    with pytest.raises(UserError) as error:
        place_linears(on_meta(config), None)
    assert str(error.value) == message


def test_fused_projections_are_not_sliced(plan_file):
    path = plan_file({"gate_up_proj": "colwise", "down_proj": "rowwise"})
    with pytest.raises(UserError) as error:
        place_linears(on_meta(Phi3Config(**TINY)), path)
    assert str(error.value) == (
        f"--tp_plan {path}: model.layers.0.mlp.gate_up_proj has 96 outputs for the 48 inputs of"
        " model.layers.0.mlp.down_proj, so it holds several projections that slices would mix; use"
        " --tensor_parallel_size 1"
    )


def test_projections_interleaved_by_head_are_sliced_as_their_model_says():
    model = on_meta(
        GPTNeoXConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    )
    assert {name.removeprefix("gpt_neox.layers.0."): kind for name, kind in place_linears(model, None).items()} == {
        "attention.query_key_value": "column", "attention.dense": "row",
        "mlp.dense_h_to_4h": "column", "mlp.dense_4h_to_h": "row",
    }  # fmt: skip


@pytest.mark.parametrize("pattern", [r"(\w+.?)+!", "*" * 20 + "x"], ids=["nested", "stars"])
def test_a_pattern_that_never_ends_is_refused(pattern, plan_file, monkeypatch):
    monkeypatch.setattr(expressions, "_SECONDS", 1)
    path = plan_file({pattern: "colwise"})
    with pytest.raises(UserError) as error:
        place_linears(llama(), path)
    assert str(error.value) == (
        f"--tp_plan {path}: matching {pattern!r} does not end in seconds; write names, dots and *"
    )
