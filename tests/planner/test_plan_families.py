"""What the planner counts without memory is what autograd saves of the real model, in every supported family."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from comol_ds.errors import UserError
from comol_ds.layout import RankGrid
from comol_ds.parallel.activations import prepare_activations
from comol_ds.parallel.assemble import attach_adapter
from comol_ds.parallel.mesh import Mesh
from comol_ds.parallel.vocabulary import Vocabulary
from comol_ds.planner.plan import Planner
from tests.planner.geometries import request, save_config, template
from tests.settings.meta_models import SIZES
from tests.tiny_models import FAMILIES

TOKENS = 48


def five_layers(name: str) -> PretrainedConfig:
    """More than the two that the planner runs, for what stands for the others must be right."""
    values = FAMILIES[name].to_dict() | {"num_hidden_layers": 5}
    kinds = values.pop("layer_types", None) or []
    if len(set(kinds)) > 1:
        values["layer_types"] = [*kinds, *kinds, kinds[0]]
    return type(FAMILIES[name])(**values)


def saved_by(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> int:
    """Bytes of the distinct storages that a forward pass and the loss save, parameters and buffers excluded."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    held = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    vocabulary = Vocabulary()
    vocabulary.watch_head(model.get_base_model().get_output_embeddings())
    positions = torch.arange(ids.numel())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), vocabulary.only(positions):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        vocabulary.cross_entropy(logits.squeeze(0), ids.flatten(), ignored=-1)
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


CASES = [
    *((name, {}) for name in ("llama", "llama_tied", "llama_bias", "qwen2", "qwen3", "mistral", "gemma3")),
    *(("llama", {"activation_checkpointing": mode}) for mode in ("full", "selective:2", "selective:3")),
    ("gemma3", {"activation_checkpointing": "full"}),
    ("llama", {"bf16": "true"}),
    ("llama", {"router": "input", "lora_dropout": "0.1"}),
    ("llama", {"lora_dropout": "0.1", "dropout_scheme": "paper"}),
    ("llama", {"attn_implementation": "eager"}),
    ("llama", {"per_device_train_batch_size": "3"}),
    ("llama", {"target_modules": r".*layers\.(0|3)\.mlp\.down_proj"}),
    ("qwen3", {"target_modules": "all-linear"}),
    ("llama", {"modules_to_save": "lm_head"}),
]


@pytest.mark.parametrize(
    ("name", "flags"),
    [case if not case[1] else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
    ids=str,
)
def test_as_many_bytes_as_autograd_saves(name, flags, tmp_path):
    folder = save_config(five_layers(name), tmp_path)
    flags = {"bf16": "false", "per_device_train_batch_size": "1"} | flags
    words = [word for flag, value in flags.items() for word in (f"--{flag}", value)]
    asked = request(folder, 1, template(1), "--max_length", TOKENS, *words)
    kept = Planner().plan(asked).activations

    dtype = torch.bfloat16 if asked.config.model.bf16 else torch.float32
    base = AutoModelForCausalLM.from_config(
        five_layers(name), dtype=dtype, attn_implementation=asked.config.model.attn_implementation
    )
    model = attach_adapter(base, asked.config.adapter, seed=0).train().to(dtype)
    prepare_activations(model, asked.config.model, Mesh(RankGrid(0, 1)), leaf_layers=False)
    rows = asked.batches.micro_batch
    ids = torch.randint(3, 300, (rows, TOKENS))
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[-1, -1] = 0
    found = saved_by(model, ids, mask)
    assert kept.layers + kept.ends == pytest.approx(found, rel=0.02)


@pytest.mark.slow
def test_flash_attention_is_planned_without_its_package_for_a_model_that_has_no_sdpa(tmp_path):
    config = Gemma2Config(**SIZES)
    kept = {}
    for attention in ("flash_attention_2", "eager"):
        folder = save_config(config, tmp_path)
        asked = request(folder, 1, template(1), "--max_length", TOKENS, "--attn_implementation", attention)
        kept[attention] = Planner().plan(asked).activations.layers
    assert 0 < kept["flash_attention_2"] < kept["eager"]  # which saves scores of every pair of tokens


def test_a_model_whose_pass_depends_on_values_is_refused(tmp_path, monkeypatch):
    forward = LlamaRMSNorm.forward

    def looks(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return forward(self, hidden_states) * (1 if hidden_states.sum().item() > 0 else 2)

    monkeypatch.setattr(LlamaRMSNorm, "forward", looks)
    folder = save_config(FAMILIES["llama"], tmp_path)
    with pytest.raises(UserError) as error:
        Planner().plan(request(folder, 1, template(1)))
    assert str(error.value).startswith(
        f"--model_name_or_path {folder}: the activations of LlamaForCausalLM cannot be planned, its forward pass cannot"
        " run without values: "
    )
    assert "\n" not in str(error.value)


def test_planning_leaves_no_trace_in_the_process(tmp_path):
    linear = torch.nn.functional.linear
    Planner().plan(request(save_config(FAMILIES["llama"], tmp_path), 1, template(3)))
    assert torch.nn.functional.linear is linear
    assert torch.ones(2).sum().item() == 2
