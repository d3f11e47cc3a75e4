"""Makes a model on the meta device run, forward and backward, on tensors that have every property but memory.

Fake tensors of the CPU (torch._subclasses) take the code path of a real CPU, unlike meta tensors, for which
scaled_dot_product_attention writes out the attention matrix. With a causal mask, CPU and CUDA kernels save the same for
backward: query, key, value, output, and one fp32 number per head and token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from comol_ds.adapters.comol_layer import CoMoLLinear
from comol_ds.adapters.routing import InputDropout
from comol_ds.parallel.tp_layers import ShardedInputDropout
from comol_ds.planner.request import Request

_PLAIN_LINEAR = torch._C._nn.linear  # torch.nn.functional.linear before DeepSpeed has replaced it in this process


@contextmanager
def without_memory(model: nn.Module, request: Request) -> Iterator[None]:
    """Inside, ``model``, built on meta, runs like the request's. It is changed for good and serves nothing else."""
    base = model.get_base_model()
    linear = F.linear
    F.linear = zero3_linear_wrap if replaces_linear(request) else _PLAIN_LINEAR
    try:
        with FakeTensorMode():
            _give_storages(model)
            _choose_attention(base, request)
            _replace_seeded_dropout(model)
            if needs_input_gradients(request):
                base.enable_input_require_grads()
            yield
    finally:
        F.linear = linear


def replaces_linear(request: Request) -> bool:
    """Whether zero.Init puts its own function in the place of torch's: it saves the weight and not its transposed view,
    which would keep the gathered weight alive, and the input of every Linear, even if the weight is frozen.
    """
    return request.stage == 3 and request.zero.memory_efficient_linear


def needs_input_gradients(request: Request) -> bool:
    """Whether the first layer's input requires a gradient, as checkpointing and ZeRO-3's leaf modules need it."""
    return request.stage == 3 or request.config.model.checkpointed_every > 0


def has_mask(request: Request) -> bool:
    """Whether attention gets a mask [B, 1, T, T]: rows of different lengths, or packed ones; else it is only causal."""
    return request.config.data.packing or request.batches.micro_batch > 1


def _give_storages(model: nn.Module) -> None:
    """Parameters and buffers on meta -> fake ones on the CPU; tied weights stay tied."""
    fakes: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, real in module._parameters.items():
            if real is not None:
                fake = nn.Parameter(torch.empty(real.shape, dtype=real.dtype), real.requires_grad)
                module._parameters[name] = fakes.setdefault(id(real), fake)
        for name, real in module._buffers.items():
            if real is not None:
                module._buffers[name] = torch.empty(real.shape, dtype=real.dtype)


_MASKED, _CAUSAL = "planned_with_mask", "planned_causal"


def _choose_attention(base: PreTrainedModel, request: Request) -> None:
    """The request's kernel, with a mask that need not be computed: it would be from values, which do not exist.

    flash_attention_2 saves what sdpa saves without a mask.
    """
    if request.config.model.attn_implementation == "eager":
        return
    masked = request.config.model.attn_implementation == "sdpa" and has_mask(request)
    base.config._attn_implementation = _MASKED if masked else _CAUSAL


def _mask(
    batch_size: int, q_length: int, kv_length: int, device: torch.device, local_size: int | None = None, **_: Any
) -> torch.Tensor:
    return torch.empty(batch_size, 1, q_length, kv_length, dtype=torch.bool, device=device)


def _mask_of_a_window(kv_length: int, local_size: int | None = None, **sizes: Any) -> torch.Tensor | None:
    """Without padding only a window that is shorter than the row needs a mask."""
    return None if local_size is None or kv_length < local_size else _mask(kv_length=kv_length, **sizes)


def _attention(*tensors: Any, softcap: float | None = None, **options: Any) -> tuple[torch.Tensor, None]:
    """sdpa; a cap of the scores, which it does not have, saves nothing in flash_attention_2."""
    return sdpa_attention_forward(*tensors, **options)


for _name, _make in ((_MASKED, _mask), (_CAUSAL, _mask_of_a_window)):
    AttentionInterface.register(_name, _attention)
    AttentionMaskInterface.register(_name, _make)


class _Dropout(InputDropout):
    """As much memory as `ShardedInputDropout`, which draws its seed as a number."""

    def forward(self, x: torch.Tensor, dropout: nn.Module) -> torch.Tensor:
        return x if isinstance(dropout, nn.Identity) else x * torch.empty_like(x)


def _replace_seeded_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, CoMoLLinear) and isinstance(module.input_dropout, ShardedInputDropout):
            module.input_dropout = _Dropout()
