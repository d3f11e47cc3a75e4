"""The losses on routers and cores against literal sums in float64, and the way they are attached to a layer."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from comol_ds.adapters.router_losses import attach_loss, core_diversity_loss, load_balance_loss, router_z_loss

N, E, R = 7, 4, 3


@pytest.fixture
def logits():
    return torch.randn(N, E, generator=torch.Generator().manual_seed(1), dtype=torch.float64).mul_(3).requires_grad_()


@pytest.fixture
def weights():
    values = torch.rand(N, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    values[2] = 0
    return values


def test_load_balance_loss(logits, weights):
    p = torch.softmax(logits, 1)
    load = torch.softmax(torch.arange(E, dtype=torch.float64), 0)
    literal = sum(E * load[e].item() * sum(weights[n].item() * p[n, e].item() for n in range(N)) for e in range(E))
    assert load_balance_loss(p, weights, load).item() == pytest.approx(literal, rel=1e-12)


def test_load_balance_loss_is_smallest_at_an_even_load(logits, weights):
    p = torch.softmax(logits, 1).detach()
    mean = (weights @ p) / weights.sum()
    even = torch.full((N, E), 1 / E, dtype=torch.float64)
    assert load_balance_loss(even, weights, even[0]).item() == pytest.approx(weights.sum().item(), rel=1e-12)
    assert load_balance_loss(p, weights, mean) > weights.sum()


def test_even_load_has_no_gradient(logits, weights):
    """In the first step nothing is known of the load."""
    load_balance_loss(torch.softmax(logits, 1), weights, torch.full((E,), 1 / E, dtype=torch.float64)).backward()
    assert logits.grad.abs().max() < 1e-15


def test_gradient_moves_gates_from_loaded_to_idle_experts(logits, weights):
    load = torch.tensor([0.7, 0.1, 0.1, 0.1], dtype=torch.float64)
    load_balance_loss(torch.softmax(logits, 1), weights, load).backward()
    used = weights > 0
    assert (logits.grad[used, 0] > 0).all() and (logits.grad[used, 1:] < 0).all()
    assert (logits.grad[~used] == 0).all()


def test_router_z_loss(logits, weights):
    literal = sum(
        weights[n].item() * math.log(sum(math.exp(value) for value in logits[n].tolist())) ** 2 for n in range(N)
    )
    assert router_z_loss(logits, weights).item() == pytest.approx(literal, rel=1e-12)
    assert torch.autograd.gradcheck(lambda values: router_z_loss(values, weights), (logits,))


@pytest.mark.parametrize("experts", [1, 2, 5])
def test_core_diversity_loss(experts):
    cores = torch.randn(experts, R, R, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    cosines = [
        float((a * b).sum() / (a.norm() * b.norm())) for i, a in enumerate(cores) for j, b in enumerate(cores) if i != j
    ]
    literal = sum(cosine**2 for cosine in cosines) / max(len(cosines), 1)
    assert core_diversity_loss(cores).item() == pytest.approx(literal, rel=1e-12)
    assert torch.autograd.gradcheck(core_diversity_loss, (cores.requires_grad_(),))


def test_core_diversity_loss_has_its_ends():
    same = torch.ones(3, R, R)
    assert core_diversity_loss(same).item() == pytest.approx(1)
    apart = torch.zeros(2, R, R)
    apart[0, 0, 0] = apart[1, 1, 1] = 5
    assert core_diversity_loss(apart).item() == 0


@pytest.mark.parametrize("mode", ["plain", "non-reentrant", "reentrant"])
def test_attached_loss_adds_its_gradient_and_nothing_else(mode):
    """Under reentrant checkpointing the loss never leaves the layer as a tensor with a graph."""
    w = torch.tensor([2.0, -3.0], requires_grad=True)
    x = torch.tensor([1.5, 0.5], requires_grad=True)

    def layer(x):
        y = w * x
        return attach_loss(y, 0.25 * (y**2).sum())

    y = layer(x) if mode == "plain" else checkpoint(layer, x, use_reentrant=mode == "reentrant")
    assert torch.equal(y, w * x)
    (10 * y.sum()).backward()
    expected_w = 10 * x + 0.5 * w * x * x
    expected_x = 10 * w + 0.5 * w * w * x
    torch.testing.assert_close(w.grad, expected_w.detach())
    torch.testing.assert_close(x.grad, expected_x.detach())


def test_attached_loss_keeps_its_own_precision():
    p = torch.tensor([0.25, 0.75], dtype=torch.bfloat16, requires_grad=True)
    attached = attach_loss(p, p.float().square().sum() * 1e-3)
    assert attached.dtype == torch.bfloat16
    attached.sum().backward()
    torch.testing.assert_close(p.grad, torch.tensor([1.0005, 1.0015], dtype=torch.bfloat16))
