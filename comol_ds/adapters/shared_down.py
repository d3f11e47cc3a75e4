"""One product with the A of all layers that read the same tensor: [h_q | h_k | h_v] = x [A_q; A_k; A_v]^T.

A product of x [N, I] with a narrow A [R, I] takes as long as reading x, and so do its two gradients; three layers side
by side read x once instead of three times and leave one gradient of x instead of three to add up. On a CPU the whole
adapter paths of q, k, v take 0.72 to 0.96 of the time, those of gate, up 0.97 to 1.02 (`python launch/benchmark.py
siblings`). Parameters stay in their layers, under their names.

Glossary: N tokens, I in_features, R rank, E experts.
"""

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from comol_ds.adapters.comol_layer import CoMoLLinear

# Projections of transformers' decoders that get one and the same tensor.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def share_down_projections(root: nn.Module) -> None:
    """Let adapted siblings below ``root`` read their common input once.

    When one of them runs, forward or backward, the parameters of all must be whole: under ZeRO-3 ``root`` must be a
    leaf module, which is gathered as one. Siblings are recognised by the tensor object that they are called with, so a
    model that gives them different ones stays right, and under torch.compile each reads for itself.
    """
    for parent in root.modules():
        for names in SIBLINGS:
            children = [getattr(parent, name, None) for name in names]
            readers = [child for child in children if isinstance(child, CoMoLLinear)]
            if len(readers) > 1:
                shared = SharedDown(readers)
                parent.register_forward_hook(shared.forget)
                for reader in readers:
                    reader.shared_down = shared


class SharedDown:
    """What the first reader of a tensor computes for those that follow, kept until they have fetched it."""

    def __init__(self, readers: list[CoMoLLinear]) -> None:
        self._readers = readers
        self._source: torch.Tensor | None = None
        self._products: dict[tuple[CoMoLLinear, str], list[torch.Tensor]] = {}

    def __call__(self, reader: CoMoLLinear, x: torch.Tensor, adapter_name: str) -> list[torch.Tensor]:
        """x [..., I] times each of the reader's `input_weights`: h [..., R], and logits [..., E] if it routes on x."""
        key = (reader, adapter_name)
        if self._source is not x:
            self._source, self._products = x, {}
        if key not in self._products:
            self._read(x, adapter_name)
        return self._products.pop(key)

    def forget(self, *_: object) -> None:
        """The parent's forward has ended: keep no activation alive."""
        self._source, self._products = None, {}

    def _read(self, x: torch.Tensor, adapter_name: str) -> None:
        readers = [reader for reader in self._readers if adapter_name in reader.comol_A]
        weights = [reader.input_weights(adapter_name) for reader in readers]
        dtype = weights[0][0].dtype
        found = iter(_ReadOnce.apply(readers[0]._cast_input_dtype(x, dtype), *(w for own in weights for w in own)))
        for reader, own in zip(readers, weights, strict=True):
            self._products[reader, adapter_name] = [next(found) for _ in own]


class _ReadOnce(torch.autograd.Function):
    """x [..., I] and weights [M, I] each -> x W^T [..., M] each; keeps x and the weights, not their stack."""

    @staticmethod
    def forward(ctx, x, *weights):
        device = x.device.type
        ctx.wide = x.dtype
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        ctx.save_for_backward(x, *weights)
        with torch.autocast(device, enabled=False):
            products = x.reshape(-1, x.shape[-1]) @ _stacked(weights, x.dtype).t()
        return products.view(*x.shape[:-1], products.shape[-1]).split([len(weight) for weight in weights], dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):  # [..., M] each
        x, *weights = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            gradient = torch.cat([part.reshape(-1, part.shape[-1]) for part in gradients], dim=-1)
            grad_x = grad_weights = None
            if ctx.needs_input_grad[0]:
                grad_x = (gradient @ _stacked(weights, x.dtype)).view_as(x).to(ctx.wide)
            if any(ctx.needs_input_grad[1:]):
                grad_weights = gradient.t() @ x.reshape(-1, x.shape[-1])
        if grad_weights is None:
            return grad_x, *(None for _ in weights)
        parts = grad_weights.split([len(weight) for weight in weights])
        return grad_x, *(part.to(weight.dtype) for part, weight in zip(parts, weights, strict=True))


def _stacked(weights: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    return torch.cat(weights).to(dtype)
