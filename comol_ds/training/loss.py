"""The language-model loss as a sum over tokens, so that every token of a global batch weighs the same."""

import torch
import torch.nn.functional as F

from comol_ds.data.tokenization import IGNORED


def count_targets(labels: torch.Tensor) -> int:
    """Number of positions with a loss: every labelled token but the first of its row. labels [B, T]."""
    return int((labels[:, 1:] != IGNORED).sum())


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each next token in fp32, 0 where ignored.

    Args:
        logits: [B, T, V], any float type.
        labels: [B, T], token ids or -100; not shifted.

    Returns:
        [B, T-1].
    """
    predictions = logits[:, :-1].float()  # B T-1 V
    targets = labels[:, 1:]
    losses = F.cross_entropy(predictions.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view_as(targets)
