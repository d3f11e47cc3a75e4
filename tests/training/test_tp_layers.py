"""What tensor parallelism puts around a layer, without other ranks: the masks, the shared input."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from comol_ds.layout import RankGrid
from comol_ds.parallel.tp_layers import ShardedInputDropout, SharedInput

ROWS, COLUMNS, P = 400, 50, 0.3


def dropped(rank: int, seed: int, ranks: int = 2) -> torch.Tensor:
    """Ones after the dropout of one rank, whose default generator starts at a seed."""
    torch.manual_seed(seed)
    return ShardedInputDropout(RankGrid(rank, ranks, ranks)).train()(torch.ones(ROWS, COLUMNS), nn.Dropout(P))


def test_dropout_has_the_distribution_of_one_process():
    kept = dropped(0, seed=1)
    assert kept.unique().tolist() == [0, pytest.approx(1 / (1 - P))]
    assert kept.mean().item() == pytest.approx(1, abs=0.02)  # standard error of 20,000 draws: 0.005


def test_ranks_drop_other_columns_and_stay_in_step():
    masks, after = [], []
    for rank in range(4):
        masks.append(dropped(rank, seed=1, ranks=4) > 0)
        after.append(torch.rand(3))  # the default generator that all ranks share
    assert all(torch.equal(after[0], other) for other in after[1:])
    for one in range(4):
        for other in range(one):
            agree = (masks[one] == masks[other]).float().mean().item()
            assert agree == pytest.approx((1 - P) ** 2 + P**2, abs=0.03), "independent masks"


def test_consecutive_masks_differ():
    dropout = ShardedInputDropout(RankGrid(0, 2, 2)).train()
    x = torch.ones(ROWS, COLUMNS)
    assert not torch.equal(dropout(x, nn.Dropout(P)), dropout(x, nn.Dropout(P)))


def test_recomputation_draws_the_same_mask():
    dropout, drop = ShardedInputDropout(RankGrid(1, 2, 2)).train(), nn.Dropout(P)
    x = torch.ones(ROWS, COLUMNS, requires_grad=True)
    y = checkpoint(lambda x: dropout(x, drop) * x, x, use_reentrant=False)
    torch.rand(5)  # what the rest of the model draws before backward
    y.sum().backward()
    torch.testing.assert_close(x.grad, 2 * y.detach())  # d(mask x^2) = 2 mask x, at x = 1


def test_nothing_is_dropped_in_evaluation_or_at_probability_0():
    x = torch.ones(2, 3)
    dropout = ShardedInputDropout(RankGrid(0, 2, 2))
    assert dropout.eval()(x, nn.Dropout(P)) is x
    assert dropout.train()(x, nn.Identity()) is x


def test_readers_of_one_tensor_share_its_copy():
    shared = SharedInput(3, SimpleNamespace(tensor_group=None))
    x = torch.ones(2, requires_grad=True) * 2
    copies = [shared(None, (x,))[0] for _ in range(3)]
    assert copies[0] is copies[1] is copies[2] is not x
    assert shared._copy is None, "no activation is kept after its last reader"
    assert shared(None, (x,))[0] is not copies[0], "the next forward pass makes its own"


def test_a_reader_of_another_tensor_gets_another_copy():
    shared = SharedInput(2, SimpleNamespace(tensor_group=None))
    x, z = torch.ones(2, requires_grad=True) * 2, torch.ones(2, requires_grad=True) * 3
    assert torch.equal(shared(None, (x,))[0], x) and torch.equal(shared(None, (z,))[0], z)


def test_without_gradients_nothing_is_copied():
    x = torch.ones(2)
    assert SharedInput(2, SimpleNamespace(tensor_group=None))(None, (x,))[0] is x
