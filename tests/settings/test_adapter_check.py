"""Adapters that would do nothing are refused by name, before a rank starts."""

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    BambaConfig,
    BloomConfig,
    DeepseekV3Config,
    Gemma3Config,
    JambaConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    PreTrainedConfig,
)
from transformers.models.llama.modeling_llama import LlamaMLP

from comol_ds.config import AdapterSettings
from comol_ds.errors import UserError
from comol_ds.parallel.adapter_check import check_adapters_work
from comol_ds.parallel.assemble import attach_adapter
from tests.settings.meta_models import SIZES, on_meta
from tests.tiny_models import FAMILIES

TINY = {name: size for name, size in SIZES.items() if name != "head_dim"}
LLAMA = LlamaConfig(**SIZES)
MAMBA = MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2)
VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
GEMMA3 = Gemma3Config(text_config=FAMILIES["gemma3"].to_dict(), vision_config=VISION, mm_tokens_per_image=4)


def check(config: PreTrainedConfig, *targets: str) -> str | None:
    settings = AdapterSettings(target_modules=list(targets)) if targets else AdapterSettings()
    base = on_meta(config)
    with torch.device("meta"):
        adapted = attach_adapter(base, settings, seed=0)
    return check_adapters_work(adapted, settings, base.config._attn_implementation)


def refusal(config: PreTrainedConfig, *targets: str) -> str:
    with pytest.raises(UserError) as error:
        check(config, *targets)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("config", "targets"),
    [
        (LLAMA, ()),
        (LLAMA, ("all-linear",)),
        (LLAMA, (r".*\.layers\.1\.mlp\.up_proj",)),
        (LlamaConfig(**SIZES | {"num_hidden_layers": 9}), (r".*\.layers\.8\.mlp\.up_proj",)),  # not in the small copy
        (LLAMA, ("q_proj", "lm_head")),
        (GEMMA3, ()),
        (GEMMA3, ("all-linear",)),
        (MAMBA, ("in_proj",)),
        # reads slices of the weights of dense and dense_4h_to_h where pretraining_tp is above 1
        (BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4), ("all-linear",)),
    ],
    ids=lambda value: getattr(value, "model_type", str(value)),
)
def test_adapters_that_work(config, targets):
    assert check(config, *targets) is None


def test_a_fused_kernel_reads_the_weight_on_a_gpu_only():
    assert refusal(MAMBA, "in_proj", "out_proj") == (
        "--target_modules: adapters would do nothing, for MambaMixer reads the weight of"
        " backbone.layers.0.mixer.out_proj instead of calling it; use --target_modules in_proj"
    )
    bamba = BambaConfig(**TINY, attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8)
    assert "BambaMixer reads the weight of model.layers.0.mamba.out_proj" in refusal(bamba, "all-linear")


@pytest.mark.parametrize("target", ["x_proj", "dt_proj"])
def test_a_weight_that_is_multiplied_by_hand(target):
    assert f"MambaMixer reads the weight of backbone.layers.0.mixer.{target}" in refusal(MAMBA, target)


def test_a_parent_that_multiplies_in_another_way_is_found_by_running_it(monkeypatch):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        down = dict(self.named_children())["down_proj"]
        return F.linear(self.act_fn(self.gate_proj(x)) * self.up_proj(x), down.weight)

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    assert refusal(LLAMA, "down_proj", "up_proj") == (
        "--target_modules: adapters would do nothing, for LlamaMLP does not call model.layers.0.mlp.down_proj, or"
        " without gradients; use --target_modules up_proj"
    )


def test_a_module_in_which_no_gradient_flows(monkeypatch):
    call = LlamaMLP.forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return call(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    assert "LlamaMLP does not call model.layers.0.mlp.up_proj" in refusal(LLAMA, "up_proj")


def test_a_tower_that_is_named_in_full():
    assert refusal(GEMMA3, r".*vision_tower.*\.q_proj") == (
        "--target_modules: adapters would do nothing, for no token passes through"
        " model.vision_tower.encoder.layers.0.self_attn.q_proj; name other modules with --target_modules"
    )


def test_an_expert_without_a_token_is_not_passed_by(monkeypatch):
    """Experts as a list of Linears, of which a router chooses one for all tokens."""

    class Experts(torch.nn.ModuleList):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self[2](x)

    build = LlamaMLP.__init__

    def init(self, config) -> None:
        build(self, config)
        size = config.hidden_size
        self.experts = Experts(torch.nn.Linear(size, size, bias=False) for _ in range(4))

    call = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "__init__", init)
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: call(self, x) + self.experts(x))
    check(LLAMA, "all-linear")
    monkeypatch.setattr(LlamaMLP, "forward", call)
    assert "does not call model.layers.0.mlp.experts.0" in refusal(LLAMA, "all-linear")


def test_a_linear_that_returns_more_than_its_product():
    config = Llama4TextConfig(
        **SIZES, intermediate_size_mlp=48, num_local_experts=2, layer_types=["full_attention"] * 2
    )
    assert refusal(config, "router") == (
        "target_modules match 'model.layers.0.feed_forward.router', a Llama4Router, which does not return x W^T; CoMoL"
        " wraps what returns one tensor [..., out_features]"
    )


def test_what_no_small_copy_can_show_is_not_refused():
    config = DeepseekV3Config(**TINY, n_routed_experts=2, num_experts_per_tok=3, n_group=1, topk_group=1)
    note = check(config, "o_proj")
    assert note.startswith("note: whether the model uses every adapter could not be tried on a small copy of it: ")


def test_state_space_and_attention_layers_in_one_model():
    config = JambaConfig(**TINY, attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_dt_rank=4)
    check(config, "q_proj", "in_proj", "x_proj", "out_proj")
    assert "JambaMambaMixer reads the weight of model.layers.0.mamba.dt_proj" in refusal(config, "all-linear")
