"""A small copy of a model's architecture that runs in a moment: what a model's code does is tried on it, not looked up.

Every width is divided by one factor, so that sums and products of widths still fit each other; numbers of heads,
experts and groups stay, so that tensor parallelism divides the copy as it divides the model. Of the decoder layers the
first ones stay that hold every kind. Weights are random: nothing is read.
"""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from math import gcd

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from comol_ds.adapters.text_model import text_model
from comol_ds.base_config import build_here, has_own_code
from comol_ds.errors import one_line

VOCABULARY = 97  # of the copy; odd, so that tensor-parallel ranks get parts of unequal size

_WIDTH = re.compile(
    r"(hidden|intermediate|embedding|feed_forward|head)_size|(^|_)d_(model|inner|ff|ssm|head|kv)$|dim(_|$)|headdim"
    r"|_rank$|_embd$|n_inner|dff|kv_channels|lru_width"
)
_NO_WIDTH = re.compile(r"kernel|num_|vocab")  # a convolution's kernel_dim, num_dims
_WINDOW = re.compile(r"sliding_window(_size)?$|attention_(chunk|window)_size$|window_size$|local_attention$")
_NUMBERS_A_LAYER = re.compile(r"idx|index|layer_(id|num)")  # attributes in which equal layers differ

_HIDDEN = 64  # the copy's least hidden size
_HEAD = 8  # the size of its heads, of which rotary embeddings may turn a quarter
_LARGEST = 96 * 2**20  # parameters, of 4 bytes
_SHORT_WINDOW = 4
_CHUNK = 8  # tokens that a state space computes at once; it pads to whole chunks


class NotShrinkable(Exception):
    """No small copy of the model runs; says why, on one line."""


def shrunken_copy(
    config: PreTrainedConfig,
    attn_implementation: str = "sdpa",
    max_length: int = 0,
    accepts: Callable[[PreTrainedModel], bool] = lambda model: True,
) -> PreTrainedModel:
    """A small model of the same architecture on the CPU, in fp32 and evaluation mode, without gradients.

    Towers beside the text model (vision, audio) stay on meta: no token passes through them.

    Args:
        config: the model's own; it is not changed.
        attn_implementation: the run's; see `build_here`.
        max_length: tokens of the run's longest rows. Windows that such rows exceed are shorter than the copy's rows
            too.
        accepts: whether a copy will do; a larger one is tried if not.

    Raises:
        NotShrinkable: no copy small enough can be built and run.
    """
    reasons = []
    for factor in _factors(config.get_text_config()):
        small = _shrunken_config(config, factor, max_length)
        try:
            model = build_here(partial(_without_memory, small), attn_implementation)
            _keep_every_kind(model)
            _draw(model)
            finite = bool(torch.isfinite(logits_of(model, input_ids=torch.arange(3, 12).unsqueeze(0))).all())
        except Exception as error:  # whatever the model's own code raises at sizes that it was not made for
            reasons.append(one_line(error, limit=200))
            continue
        if finite and accepts(model):
            return model
        reasons.append("its sizes cannot be divided" if finite else "its logits are not finite")
    raise NotShrinkable(reasons[0])


def logits_of(model: PreTrainedModel, **inputs: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V] as training calls the model, without a cache; no gradient."""
    with torch.no_grad():
        return model(**{"use_cache": False, **inputs}).logits


def without_numbers(name: str) -> str:
    """What the names of the same module in all layers share: model.layers.3.mlp -> model.layers.*.mlp."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _factors(settings: PreTrainedConfig) -> list[int]:
    """Powers of two that divide hidden and head size: what makes the copy small, then larger ones, for models of many
    experts, then smaller ones down to 1, for those whose code needs more width."""
    hidden, heads, head = (_size(settings, name) for name in ("hidden_size", "num_attention_heads", "head_dim"))
    hidden = hidden or 1
    head = head or hidden // (heads or 1)
    powers = [2**k for k in range(16) if gcd(hidden, head) % 2**k == 0 and hidden // 2**k >= _HIDDEN] or [1]
    best = max(factor for factor in powers if factor == 1 or head // factor >= _HEAD)
    return [best, *(factor for factor in powers if factor > best), *(f for f in reversed(powers) if f < best)]


def _size(settings: PreTrainedConfig, name: str) -> int | None:
    with suppress(Exception):  # where sizes differ from layer to layer transformers raises an error of its own
        return getattr(settings, name)
    return None


def _shrunken_config(config: PreTrainedConfig, factor: int, max_length: int) -> PreTrainedConfig:
    small = copy.deepcopy(config)
    for part in {id(part): part for part in (small, *_nested(small.get_text_config()))}.values():
        in_text = part is not small or small.get_text_config() is small
        for name, value in list(vars(part).items()):
            if name.endswith("pad_token_id") and value is not None:
                setattr(part, name, 0)
            elif type(value) is not int:
                if isinstance(value, dict) and in_text:
                    _shrink_sections(value, factor)
            elif "vocab_size" in name:
                setattr(part, name, min(value, VOCABULARY))
            elif name.endswith("chunk_size") and not _WINDOW.search(name):
                setattr(part, name, min(value, _CHUNK))
            elif _WINDOW.search(name) and 0 < value < max_length:
                setattr(part, name, min(value, _SHORT_WINDOW))
            elif in_text and _WIDTH.search(name) and not _NO_WIDTH.search(name):
                setattr(part, name, -(-value // factor))
    return small


def _nested(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _nested(value)


def _shrink_sections(values: dict, factor: int) -> None:
    """Rotary embeddings of several kinds of positions divide a head's width among them."""
    for name, value in values.items():
        if name == "mrope_section":
            values[name] = [-(-size // factor) for size in value]


def _without_memory(config: PreTrainedConfig, attn_implementation: str) -> PreTrainedModel:
    with no_init_weights(), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config,
            trust_remote_code=has_own_code(config),
            dtype=torch.float32,
            attn_implementation=attn_implementation,
        )
    model.tie_weights()
    return model.eval().requires_grad_(False)


def _keep_every_kind(model: PreTrainedModel) -> None:
    """Delete the decoder layers after the first ones that hold every kind, two at least."""
    settings = model.config.get_text_config()
    number = getattr(settings, "num_hidden_layers", None)
    lists = (module for module in text_model(model).modules() if isinstance(module, nn.ModuleList))
    layers = next((module for module in lists if len(module) == number), None)
    if layers is None:
        return
    kinds = [_kind(layer) for layer in layers]
    del layers[max(2, *(kinds.index(kind) + 1 for kind in kinds)) :]


def _kind(layer: nn.Module) -> tuple:
    """What tells layers apart: the types of their modules, and their whole numbers, switches and words."""
    found = []
    for name, module in layer.named_modules():
        own = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, bool | int | str) and not _NUMBERS_A_LAYER.search(key)
        }
        shapes = [(key, tuple(parameter.shape)) for key, parameter in module.named_parameters(recurse=False)]
        found.append((name, type(module), *sorted(own.items()), *shapes))
    return tuple(found)


def _draw(model: PreTrainedModel) -> None:
    """Give parameters memory and values at which everything counts: norms and biases too, which start as 1 and 0."""
    beside = _towers(model)
    places = [
        (module, name)
        for module in model.modules()
        if module not in beside
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    distinct = {id(module._parameters[name]): module._parameters[name].numel() for module, name in places}
    if sum(distinct.values()) > _LARGEST:
        raise NotShrinkable(f"its smallest copy has {sum(distinct.values())} parameters")
    generator = torch.Generator().manual_seed(0)
    drawn: dict[int, nn.Parameter] = {}
    for module, name in places:
        declared = module._parameters[name]
        if id(declared) not in drawn:
            values = _values(declared, isinstance(module, nn.Embedding), generator)
            drawn[id(declared)] = nn.Parameter(values, requires_grad=False)
        module._parameters[name] = drawn[id(declared)]


def _values(declared: nn.Parameter, is_embedding: bool, generator: torch.Generator) -> torch.Tensor:
    """Matrices keep the scale of what they multiply; embeddings are of scale 1; vectors lie around 0.7."""
    values = torch.empty(declared.shape, dtype=declared.dtype)
    if values.dim() < 2:
        return values.uniform_(0.2, 1.2, generator=generator)
    bound = (3 / (1 if is_embedding else max(1, values.shape[-1]))) ** 0.5
    return values.uniform_(-bound, bound, generator=generator)


def _towers(model: PreTrainedModel) -> set[nn.Module]:
    """The modules of models that lie beside the text model."""
    text = text_model(model)
    within = set(text.modules())
    beside = (
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and module not in within and text not in set(module.modules())
    )
    return {module for tower in beside for module in tower.modules()}
