"""The loss of every token, against a literal computation."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from comol_ds.config import AdapterSettings
from comol_ds.parallel import cross_entropy
from comol_ds.parallel.assemble import attach_adapter
from comol_ds.parallel.vocabulary import Vocabulary
from comol_ds.training.loss import count_targets, positions_with_loss
from tests.kept_tensors import MadeTensors
from tests.tiny_models import FAMILIES, random_batch
from tests.token_losses import token_losses

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


@pytest.fixture
def chunk_rows(monkeypatch):
    """Sets how many rows of a vocabulary are worked on at a time."""
    return lambda rows, width: monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", rows * width)


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


def rows_of(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [N, V], targets [N] of which some are ignored, and a weight per row."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(B * T, V, generator=generator, dtype=torch.float64) * 4
    targets = torch.randint(0, V, (B * T,), generator=generator)
    targets[::4] = -100
    return logits.to(dtype), targets, torch.rand(B * T, generator=generator, dtype=torch.float64) - 0.5


@pytest.mark.parametrize("rows", [1, 4, B * T, 10**6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_torch_in_any_chunks(dtype, rows, chunk_rows):
    chunk_rows(rows, V)
    logits, targets, weights = rows_of(dtype)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found = Vocabulary().cross_entropy(ours * 1, targets, -100)
    wide = theirs if dtype == torch.float64 else theirs.float()
    expected = F.cross_entropy(wide, targets, ignore_index=-100, reduction="none")
    torch.testing.assert_close(found, expected)
    (found * weights.to(found.dtype)).sum().backward()
    (expected * weights.to(expected.dtype)).sum().backward()
    assert ours.grad.dtype == dtype
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("rows", [0, 5])
def test_without_any_target_there_is_no_loss_and_no_gradient(rows):
    logits = torch.randn(rows, V, requires_grad=True)
    losses = Vocabulary().cross_entropy(logits * 1, torch.full((rows,), -100), -100)
    assert losses.tolist() == [0.0] * rows
    losses.sum().backward()
    assert torch.equal(logits.grad, torch.zeros(rows, V))


@pytest.mark.parametrize("target", [V, -1])
def test_an_id_outside_the_vocabulary_makes_its_loss_nan(target):
    logits, targets, _ = rows_of(torch.float32)
    expected = Vocabulary().cross_entropy(logits, targets, -100)
    targets[1] = target
    found = Vocabulary().cross_entropy(logits, targets, -100)
    assert found[1].isnan()
    expected[1] = found[1] = 0
    assert torch.equal(found, expected)


def test_small_losses_of_large_logits_keep_their_digits():
    logits = torch.full((1, V), 1000.0)
    logits[0, 3] += 10
    found = Vocabulary().cross_entropy(logits, torch.tensor([3]), -100)
    assert found.item() == pytest.approx(math.log1p((V - 1) * math.exp(-10)), rel=1e-3)


def test_no_tensor_in_fp32_is_larger_than_a_chunk(chunk_rows):
    """And none as large as the logits in any precision: backward needs no second one."""
    n, v, rows = 64, 1000, 5
    chunk_rows(rows, v)
    leaf = torch.randn(n, v).bfloat16().requires_grad_()
    logits = leaf * 1
    targets = torch.arange(n)
    with MadeTensors() as forward:
        loss = Vocabulary().cross_entropy(logits, targets, -100).sum()
    with MadeTensors() as backward:
        (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.data_ptr() == logits.data_ptr()
    for made in [*forward.made.values(), *backward.made.values()]:
        assert made.nbytes <= 4 * rows * v, made
    assert max(made.nbytes for made in forward.made.values()) == 4 * rows * v, "the chunks were seen"
    kept = sorted(made.shape for made in forward.alive() if made.shape)
    assert kept == [(n,)] * len(kept), "beside the logits, numbers per row"


def test_only_what_autograd_computed_is_overwritten():
    logits, targets, _ = rows_of(torch.float32)
    leaf = logits.clone().requires_grad_()
    for given in (leaf, leaf.view(B * T, V), (leaf * 1)[:, 1:]):
        before = given.detach().clone()
        Vocabulary().cross_entropy(given, targets.clamp(max=V - 2), -100).sum().backward()
        assert torch.equal(given, before) and torch.equal(leaf, logits)


def test_a_second_backward_pass_over_overwritten_logits_is_refused():
    logits, targets, _ = rows_of(torch.float32)
    loss = Vocabulary().cross_entropy(logits.requires_grad_() * 1, targets, -100).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_positions_with_loss(labels):
    positions, targets = positions_with_loss(labels)
    expected = [
        (b * T + t, labels[b, t + 1].item()) for b in range(B) for t in range(T - 1) if labels[b, t + 1] != -100
    ]
    assert list(zip(positions.tolist(), targets.tolist(), strict=True)) == expected
    assert len(positions) == count_targets(labels)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]], ids=" ".join)
def test_the_head_computes_logits_of_chosen_positions_only(targets):
    """A head with an adapter still sees every token, for its router's statistics."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(FAMILIES["llama"])
    model = attach_adapter(base, AdapterSettings(r=4, num_experts=3, target_modules=targets), seed=1)
    vocabulary, head = Vocabulary(), base.get_output_embeddings()
    vocabulary.watch_head(head)
    rows = []
    head.register_forward_hook(lambda module, args, logits: rows.append(args[0].shape[:-1].numel()))
    batch = random_batch(3, seed=4)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    trained = [p for p in model.parameters() if p.requires_grad]

    whole = token_losses(model(**inputs).logits, batch["labels"], vocabulary).sum()
    expected = torch.autograd.grad(whole, trained)
    positions, next_tokens = positions_with_loss(batch["labels"])
    with vocabulary.only(positions):
        logits = model(**inputs).logits
    assert logits.shape == (1, len(positions), FAMILIES["llama"].vocab_size)
    chosen = vocabulary.cross_entropy(logits.squeeze(0), next_tokens, -100).sum()
    torch.testing.assert_close(chosen, whole)
    torch.testing.assert_close(torch.autograd.grad(chosen, trained), expected)
    assert rows == [72, 72 if "lm_head" in targets else len(positions)] and len(positions) < 72
    assert model(**inputs).logits.shape[:2] == (3, 24), "afterwards all again"
