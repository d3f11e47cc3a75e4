"""A causal language model with a CoMoL adapter (arXiv 2603.00573) beside its Linears, routed token by token.

    h = x A^T      p = softmax(h R^T)      y = x W^T + s * (h sum_e p_e C_e) B^T

Needs torch and transformers >= 5 only. transformers loads it with trust_remote_code=True, and vLLM serves it with
--trust-remote-code --model-impl transformers, at any tensor-parallel size that the base's heads allow.

Glossary: I in_features, O out_features, R rank, E experts, s scaling. R of the equation is `comol_router`.
"""

from typing import ClassVar

import torch
from torch import nn
from transformers import LlamaConfig as BaseConfig
from transformers import LlamaForCausalLM as BaseForCausalLM
from transformers import LlamaModel as BaseModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

LAYERS = "layers.*."  # of the tensor-parallel plan's patterns
SAVED, REPLACED = "comol_saved.", "comol_replaced."  # in front of a weight's name


class CoMoLModelConfig(BaseConfig):
    """The base's configuration, and the adapter.

    Attributes:
        comol_r, comol_num_experts: R and E.
        comol_scaling: s = lora_alpha / r.
        comol_router: "core" routes on h, "input" on x.
        comol_modules: path of a Linear inside a layer, such as "self_attn.q_proj" -> numbers of the layers whose Linear
            of this path has an adapter.
        comol_saved: full names of modules that were trained whole and take the place of the base's.
    """

    model_type = f"comol_{BaseConfig.model_type}"

    comol_r: int = 16
    comol_num_experts: int = 8
    comol_scaling: float = 1.0
    comol_router: str = "core"
    comol_modules: dict | None = None
    comol_saved: list | None = None


class PlainLinear(nn.Module):
    """A Linear without an adapter whose namesakes in other layers have one: every layer has the same names."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base_layer = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x)


class CoMoLLinear(nn.Module):
    """A Linear with its adapter. What tensor parallelism may split are Linears, so that servers can replace them."""

    def __init__(self, linear: nn.Linear, config: CoMoLModelConfig) -> None:
        super().__init__()
        rank, experts = config.comol_r, config.comol_num_experts
        self.scaling = config.comol_scaling
        self.routes_on_input = config.comol_router == "input"
        self.base_layer = linear
        self.comol_A = nn.Linear(linear.in_features, rank, bias=False)
        self.comol_B = nn.Linear(rank, linear.out_features, bias=False)
        self.comol_router = nn.Linear(linear.in_features if self.routes_on_input else rank, experts, bias=False)
        self.comol_cores = nn.Parameter(torch.zeros(experts, rank, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [..., I] -> [..., O]
        y = self.base_layer(x)
        # Not x itself: vLLM merges Linears that read the same argument into one column-parallel weight, whatever the
        # plan says of each.
        z = x.view_as(x)
        if self.comol_A.weight.dtype == torch.float32:  # as trained, beside a base in bfloat16
            z = z.float()
        h = self.comol_A(z)  # [..., R], summed over the ranks before it is routed on
        cores = self.comol_cores  # [E, R, R]
        logits = self.comol_router(z if self.routes_on_input else h)  # [..., E]
        p = torch.softmax(logits, dim=-1, dtype=torch.float32).to(cores.dtype)
        outer = p.unsqueeze(-1) * h.to(cores.dtype).unsqueeze(-2)  # [..., E, R]
        o = torch.matmul(outer.flatten(-2), cores.flatten(0, 1)) * self.scaling  # [..., R]
        return y + self.comol_B(o.to(h.dtype)).to(y.dtype)


class CoMoLModel(BaseModel):
    """The base's decoder with the adapter."""

    config_class = CoMoLModelConfig
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["comol_"]
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [REPLACED]

    def __init__(self, config: CoMoLModelConfig) -> None:
        declare_names(config)
        super().__init__(config)
        wrap_linears(self, config)


class CoMoLForCausalLM(BaseForCausalLM):
    """The base's language model with the adapter."""

    config_class = CoMoLModelConfig
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["comol_"]
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [REPLACED]

    def __init__(self, config: CoMoLModelConfig) -> None:
        declare_names(config)
        super().__init__(config)
        wrap_linears(self.model, config)


def declare_names(config: CoMoLModelConfig) -> None:
    """Tell the tensor-parallel plan and the weight loader, before a model is built, that Linears move one level down.

    The base's files keep their names: loaders rename what they read, and reverse it where a model is saved. The base's
    weights that were trained whole are still in its files, and are renamed to something that is ignored.
    """
    plan = config.base_model_tp_plan or {}
    config.base_model_tp_plan = {
        name: style for pattern, style in plan.items() for name, style in _placed(pattern, style, config)
    }
    renamings = get_checkpoint_conversion_mapping(BaseConfig.model_type) or []
    for module in config.comol_saved or []:
        renamings += [_renaming(f"^{module}", REPLACED + module), _renaming(f"^{SAVED}{module}", module)]
    renamings += [_renaming(path, f"{path}.base_layer") for path in config.comol_modules]
    register_checkpoint_conversion_mapping(config.model_type, renamings, overwrite=True)


def _renaming(module: str, new: str) -> WeightRenaming:
    return WeightRenaming(module.replace(".", r"\.") + r"\.(weight|bias)", new + r".\1")


def _placed(pattern: str, style: str, config: CoMoLModelConfig) -> list[tuple[str, str]]:
    """What one entry of the base's plan becomes. Whatever has no entry is whole on every rank."""
    if not pattern.startswith(LAYERS) or pattern.removeprefix(LAYERS) not in config.comol_modules:
        return [(pattern, style)]
    split = ["base_layer"]
    if style == "colwise":
        split.append("comol_B")
    elif style == "rowwise":
        split.append("comol_A")
        if config.comol_router == "input":
            split.append("comol_router")
    return [(f"{pattern}.{name}", style) for name in split]


def wrap_linears(decoder: nn.Module, config: CoMoLModelConfig) -> None:
    """Put the adapter beside the Linears of a decoder that has a list `layers`."""
    for path, adapted in config.comol_modules.items():
        parent_path, _, name = path.rpartition(".")
        for number, layer in enumerate(decoder.layers):
            parent = layer.get_submodule(parent_path)
            linear = getattr(parent, name)
            setattr(parent, name, CoMoLLinear(linear, config) if number in adapted else PlainLinear(linear))
