"""The language-model loss as a sum over tokens, so that every token of a global batch weighs the same."""

import torch

from comol_ds.data.tokenization import IGNORED
from comol_ds.parallel.vocabulary import Vocabulary


def count_targets(labels: torch.Tensor) -> int:
    """Number of positions with a loss: every labelled token but the first of its row. labels [B, T]."""
    return int((labels[:, 1:] != IGNORED).sum())


def token_losses(logits: torch.Tensor, labels: torch.Tensor, vocabulary: Vocabulary) -> torch.Tensor:
    """Cross-entropy of each next token in fp32, 0 where ignored.

    Args:
        logits: [B, T, V], or this rank's slice of the vocabulary, any float type.
        labels: [B, T], token ids or -100; not shifted.
        vocabulary: how the logits are spread over the ranks.

    Returns:
        [B, T-1].
    """
    predictions = logits[:, :-1].flatten(0, 1)  # N V
    targets = labels[:, 1:]
    return vocabulary.cross_entropy(predictions, targets.flatten(), IGNORED).view_as(targets)
