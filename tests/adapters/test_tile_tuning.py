"""The search for a kernel's fastest layout: it never changes a bit, and never looks at the batch."""

import pytest
import torch

from tests.adapters.require_triton import require_triton

KEY = ("kernel", 8, 2)


@pytest.fixture
def tuning(monkeypatch):
    """The module, with nothing tuned yet; clocks and graph capture as on a GPU."""
    require_triton()
    from comol_ds.adapters import tile_tuning

    monkeypatch.setattr(tile_tuning, "_first_fit", {})
    monkeypatch.setattr(tile_tuning, "_fastest", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return tile_tuning


class FakeKernel:
    """Fills its output with what each tile would, and knows how long each takes."""

    def __init__(self, milliseconds, other_bits=(), too_large=()):
        self.milliseconds, self.other_bits, self.too_large = milliseconds, other_bits, too_large
        self.launches = []

    def __call__(self, tile, given):
        from triton import OutOfResources

        self.launches.append((tile, given))
        if tile in self.too_large:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return [torch.full((4,), 1 + 2**-23 if tile in self.other_bits else 1.0)]

    def time_of(self, call):
        call()
        return self.milliseconds[self.launches[-1][0]]


def tiles_of(tuning, count):
    return [tuning.Tile(16, warps, 1) for warps in range(1, count + 1)]


def batch(tuning, n, dtype=torch.float32):
    """Operands of a first step: B is zero, so is grad_o."""
    return tuning.Operands(
        torch.randn(n, 8, dtype=dtype),
        torch.rand(n, 2, dtype=dtype),
        torch.randn(2, 8, 8),
        torch.zeros(n, 8, dtype=dtype),
    )


def test_the_fastest_tile_of_the_same_bits_wins(tuning):
    too_large, first, slow, fast, other = tiles = tiles_of(tuning, 5)
    kernel = FakeKernel({first: 4, slow: 5, fast: 3, other: 1}, other_bits=[other], too_large=[too_large])
    assert tuning.fastest_equal_tile(tiles, kernel, batch(tuning, 4), kernel.time_of) == fast


def test_small_batches_take_the_first_tile_that_fits_and_try_no_other(tuning):
    too_large, first, _ = tiles = tiles_of(tuning, 3)
    kernel = FakeKernel({}, too_large=[too_large])
    given = batch(tuning, tuning.TUNE_FROM - 1)
    assert [tuning.tile_for(KEY, tiles, kernel, given) for _ in range(2)] == [first, first]
    assert [tile for tile, _ in kernel.launches] == [too_large, first]


def test_a_large_batch_is_tuned_once_on_random_tensors_and_serves_small_ones_too(tuning, monkeypatch):
    tiles = first, fast = tiles_of(tuning, 2)
    kernel = FakeKernel({first: 2, fast: 1})
    monkeypatch.setattr(tuning, "_milliseconds", kernel.time_of)
    assert tuning.tile_for(KEY, tiles, kernel, batch(tuning, tuning.TUNE_FROM, torch.bfloat16)) == fast
    for _, given in kernel.launches:
        assert given.h.shape == given.grad_o.shape == (tuning.TUNED_TOKENS, 8)
        assert given.grad_o.count_nonzero() == given.grad_o.numel()
        assert [tensor.dtype for tensor in given] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16]
    launches = len(kernel.launches)
    assert tuning.tile_for(KEY, tiles, kernel, batch(tuning, 3)) == fast
    assert len(kernel.launches) == launches


def test_nothing_is_measured_while_a_graph_is_captured(tuning, monkeypatch):
    tiles = first, fast = tiles_of(tuning, 2)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuning.tile_for(KEY, tiles, FakeKernel({first: 2, fast: 1}), batch(tuning, tuning.TUNE_FROM)) == first


def test_random_tensors_are_the_same_in_every_process_and_leave_the_global_generator_alone(tuning):
    before = torch.get_rng_state()
    ours, theirs = (tuning.random_operands(batch(tuning, n)) for n in (5, 7))
    torch.manual_seed(1)
    assert all(torch.equal(left, right) for left, right in zip(ours, theirs, strict=True))
    torch.set_rng_state(before)
    tuning.random_operands(tuning.Operands(torch.zeros(1, 8), torch.zeros(1, 2), torch.zeros(2, 8, 8)))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_tiles_of_the_cores_gradient_all_sum_in_the_same_steps(tuning):
    """Another number of tokens per step would be rejected for its bits every time."""
    assert len({tile.tokens for tile in (*tuning.CORE_TILES, *tuning.CORE_TILES_FP32)}) == 1
