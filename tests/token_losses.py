"""The losses of all positions from whole logits [B, T, V]: what tests compare the trainer's few positions with."""

import torch
import torch.nn.functional as F

from comol_ds.data.tokenization import IGNORED
from comol_ds.parallel.vocabulary import Vocabulary


def token_losses(logits: torch.Tensor, labels: torch.Tensor, vocabulary: Vocabulary) -> torch.Tensor:
    """[B, T-1]: cross-entropy of each next token in fp32, 0 where ignored; labels [B, T] are not shifted."""
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    losses = vocabulary.cross_entropy(logits.flatten(0, 1), targets.flatten(), IGNORED)
    return losses.view(labels.shape)[:, :-1]
