"""The loss of every token, against a literal computation."""

import math

import pytest
import torch

from comol_ds.parallel.vocabulary import Vocabulary
from comol_ds.training.loss import count_targets, token_losses

B, T, V = 3, 7, 11


@pytest.fixture
def logits():
    return torch.randn(B, T, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3


@pytest.fixture
def labels():
    labels = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(1))
    labels[0, :4] = -100
    labels[1, 5:] = -100
    labels[2] = -100
    return labels


def literal(logits: torch.Tensor, labels: torch.Tensor) -> list[list[float]]:
    rows = []
    for b in range(B):
        rows.append([])
        for t in range(T - 1):
            target = labels[b, t + 1].item()
            scores = logits[b, t].tolist()
            total = math.log(sum(math.exp(score) for score in scores))
            rows[-1].append(0.0 if target == -100 else total - scores[target])
    return rows


def test_token_losses(logits, labels):
    found = token_losses(logits.float(), labels, Vocabulary())
    assert found.shape == (B, T - 1) and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), torch.tensor(literal(logits, labels), dtype=torch.float64))


def test_half_precision_logits_are_summed_in_fp32(logits, labels):
    half = logits.bfloat16()
    found = token_losses(half, labels, Vocabulary())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), torch.tensor(literal(half.double(), labels), dtype=torch.float64))


def test_targets_are_the_labels_that_something_predicts(labels):
    counted = sum(labels[b, t].item() != -100 for b in range(B) for t in range(1, T))
    assert count_targets(labels) == counted == 3 + 4
    labels[:, 0] = 1  # nothing predicts the first token
    assert count_targets(labels) == counted


def test_gradient_of_the_sum_is_softmax_minus_one_hot(logits, labels):
    leaf = logits.float().requires_grad_()
    token_losses(leaf, labels, Vocabulary()).sum().backward()
    for b in range(B):
        for t in range(T):
            target = labels[b, t + 1].item() if t + 1 < T else -100
            expected = torch.zeros(V) if target == -100 else logits[b, t].softmax(0).float()
            if target != -100:
                expected[target] -= 1
            torch.testing.assert_close(leaf.grad[b, t], expected)
