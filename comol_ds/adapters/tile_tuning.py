"""How the mixture's Triton kernels are laid out on a GPU, and the search for the fastest layout that changes no bit.

Peers under tensor parallelism compute the same mixture and must get the same bits, and so must a resumed run. A tuner
that took whatever a clock prefers would give one process another order of sums than the next. So the first layout that
fits the GPU sets the bits, and only layouts that reproduce them on random tensors may replace it.

Glossary: N tokens, R rank, E experts.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """How a kernel is laid out: tokens per step of a program, warps, and stages of its pipeline of loads."""

    tokens: int
    warps: int
    stages: int


class Operands(NamedTuple):
    """What a pass works on, contiguous: h [N, R], p [N, E], cores [E, R, R], in backward also grad_o [N, R]."""

    h: torch.Tensor
    p: torch.Tensor
    cores: torch.Tensor
    grad_o: torch.Tensor | None = None


Launch = Callable[[Tile, Operands], list[torch.Tensor]]  # runs a kernel, returns what it computed

# The order is the preference where nothing is measured.
TOKEN_TILES = (Tile(64, 4, 2), Tile(64, 4, 3), Tile(64, 8, 2), Tile(128, 4, 2), Tile(128, 8, 2), Tile(32, 4, 2))
# Products of fp32 without tensor cores unroll into registers: at R=128, compiled by triton 3.9 for compute capability
# 9.0, Tile(64, 4, 2) spills 32 KB per thread and the first of these nothing.
TOKEN_TILES_FP32 = (Tile(32, 8, 2), Tile(32, 8, 3), Tile(16, 8, 2), Tile(16, 4, 2))
# Another number of tokens per step would be another order of the sum over tokens.
CORE_TILES = (Tile(32, 4, 2), Tile(32, 4, 3), Tile(32, 8, 2), Tile(32, 8, 3))
CORE_TILES_FP32 = (Tile(32, 8, 2), Tile(32, 8, 3), Tile(32, 4, 2))

TUNE_FROM = 1024  # tokens of a batch; smaller ones last microseconds whatever the tile
TUNED_TOKENS = 8192

_first_fit: dict[Hashable, Tile] = {}
_fastest: dict[Hashable, Tile] = {}


def tile_for(key: Hashable, tiles: Sequence[Tile], launch: Launch, given: Operands) -> Tile:
    """The tile for a kernel: the fastest, looked for at the first large batch, before that the first that fits.

    Args:
        key: what the choice depends on; the number of tokens is not part of it.
        tiles: the candidates.
        launch: runs the kernel.
        given: on a GPU.
    """
    if key in _fastest:
        return _fastest[key]
    if given.h.shape[0] >= TUNE_FROM and not torch.cuda.is_current_stream_capturing():
        _fastest[key] = fastest_equal_tile(tiles, launch, random_operands(given), _milliseconds)
        return _fastest[key]
    if key not in _first_fit:
        _first_fit[key] = next(tile for tile in tiles if _outputs(tile, launch, given) is not None)
    return _first_fit[key]


def fastest_equal_tile(
    tiles: Sequence[Tile], launch: Launch, given: Operands, time_of: Callable[[Callable[[], object]], float]
) -> Tile:
    """The fastest of the tiles that fit the GPU and give the bits of the first one that does."""
    expected, times = None, {}
    for tile in tiles:
        outputs = _outputs(tile, launch, given)
        if outputs is None:
            continue
        expected = expected or outputs
        if all(torch.equal(ours, theirs) for ours, theirs in zip(outputs, expected, strict=True)):
            times[tile] = time_of(functools.partial(launch, tile, given))
    return min(times, key=times.__getitem__)


def random_operands(given: Operands) -> Operands:
    """TUNED_TOKENS random tokens with the dtypes and other sizes of the given ones, the same in every process.

    The batch at hand would not do: before the first update B is zero, grad_o too, and of zeros every order of sums is
    the same. The global generator is not touched.
    """
    generator = torch.Generator(given.h.device).manual_seed(0)

    def normal(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=like.device).to(like.dtype)

    tokens = (TUNED_TOKENS, given.h.shape[1])
    p = torch.softmax(normal((TUNED_TOKENS, given.p.shape[1]), given.p), -1)
    grad_o = None if given.grad_o is None else normal(tokens, given.grad_o)
    return Operands(normal(tokens, given.h), p, normal(given.cores.shape, given.cores), grad_o)


def _outputs(tile: Tile, launch: Launch, given: Operands) -> list[torch.Tensor] | None:
    """None if the tile needs more shared memory than this GPU has."""
    from triton import OutOfResources  # here, so that machines without triton can import the module

    try:
        return launch(tile, given)
    except OutOfResources:
        return None


def _milliseconds(call: Callable[[], object], calls: int = 20) -> float:
    """Not triton.testing.do_bench: it allocates 256 MB to empty the L2 cache, in the middle of a training step."""
    call()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls
