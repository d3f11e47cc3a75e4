"""The language-model loss as a sum over tokens, so that every token of a global batch weighs the same."""

import torch
import torch.nn.functional as F

from comol_ds.data.tokenization import IGNORED


def count_targets(labels: torch.Tensor) -> int:
    """Number of positions with a loss: every labelled token but the first of its row. labels [B, T]."""
    return int((labels[:, 1:] != IGNORED).sum())


def positions_with_loss(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions whose next token has a label: often a quarter of a batch, the rest being prompts and padding.

    Args:
        labels: [B, T], token ids or -100; not shifted. On a GPU this waits for it; better on the host.

    Returns:
        [n] positions below B*T in ascending order, and [n] ids of their next tokens.
    """
    targets = _next_tokens(labels).flatten()
    positions = (targets != IGNORED).nonzero().squeeze(1)
    return positions, targets[positions]


def _next_tokens(labels: torch.Tensor) -> torch.Tensor:
    """[B, T] -> [B, T]: what each position is to predict; nothing at the last."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)
