"""Losses on the routers and cores, and how a loss is attached to a layer in the middle of a model.

All are sums over tokens, linear in the tokens: added up over micro-batches and ranks they equal the whole batch's.

Glossary: N tokens, E experts, R rank, p_ne gate of expert e for token n, w_n weight of token n (0 in padding).
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def load_balance_loss(p: torch.Tensor, weights: torch.Tensor, load: torch.Tensor) -> torch.Tensor:
    """E sum_e f_e sum_n w_n p_ne: the Switch Transformer's auxiliary loss (arXiv 2101.03961, eq. 4) on soft gates.

    Every expert serves every token here, so its load f_e is its mean gate, not a share of dispatched tokens. At an even
    load it is sum_n w_n, its smallest value for f_e = mean p_e.

    Args:
        p: [N, E] gates.
        weights: [N].
        load: [E], f, without gradient.
    """
    return p.shape[1] * (weights @ p.to(weights.dtype)) @ load


def router_z_loss(logits: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """sum_n w_n (ln sum_e exp(logit_ne))^2 (ST-MoE, arXiv 2202.08906, eq. 5): keeps logits [N, E] small."""
    return weights @ logits.to(weights.dtype).logsumexp(dim=1).square()


def core_diversity_loss(cores: torch.Tensor) -> torch.Tensor:
    """cores [E, R, R] -> mean over i != j of cos^2(C_i, C_j); 0 for a single core."""
    units = unit_cores(cores)
    squares = (units @ units.t()).square()
    experts = cores.shape[0]
    return (squares.sum() - squares.diagonal().sum()) / max(experts * (experts - 1), 1)


def unit_cores(cores: torch.Tensor) -> torch.Tensor:
    """cores [E, R, R] -> [E, R*R], each of norm 1, in fp32 at least."""
    return F.normalize(cores.flatten(1).to(torch.promote_types(cores.dtype, torch.float32)), dim=1)


def attach_loss(tensor: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    """The tensor, unchanged; backward through it also goes back from ``loss``, with gradient 1.

    So a loss of one layer needs no way out of it, and works under every kind of activation checkpointing: what is
    recomputed carries its own copy of the loss.
    """
    return _AttachLoss.apply(tensor, loss)


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, loss):
        ctx.save_for_backward(torch.ones_like(loss))
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (one,) = ctx.saved_tensors
        return gradient, one
