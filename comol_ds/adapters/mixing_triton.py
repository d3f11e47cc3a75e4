"""The core-space mixture o = s * sum_e p_e (h C_e) of CoMoL (arXiv 2603.00573) and its gradients as Triton kernels.

The outer product of gates and tokens, [N, E*R], which the torch path writes to memory chunk by chunk, exists here only
in registers: a program holds a block of tokens, goes through the cores and adds up in fp32. Per token it reads R + E
numbers and writes R; the cores stay in the L2 cache. No atomics: the same tensors give the same bits.

Neither the softmax before nor the product with B behind is fused in. Router statistics and losses hook the gates and
may replace them, and all that a fusion would save is a pass over p [N, E], at R=64, E=8 an eighth of h. B is an
ordinary GEMM that cuBLAS does best.

With TRITON_INTERPRET=1 the kernels run in Triton's interpreter, on CPU tensors too.

Glossary: N tokens, R rank, E experts, s = lora_alpha / r, S splits of the tokens.
"""

import functools
import os
from collections.abc import Callable, Hashable, Sequence
from types import SimpleNamespace

import torch

from comol_ds.adapters.kernel_check import check_kernels
from comol_ds.adapters.tile_tuning import (
    CORE_TILES,
    CORE_TILES_FP32,
    TOKEN_TILES,
    TOKEN_TILES_FP32,
    Launch,
    Operands,
    Tile,
    tile_for,
)

try:
    import triton
    import triton.language as tl
except ImportError:  # the torch path is taken, but the module can be imported
    triton, tl = None, SimpleNamespace(constexpr=None)

# Matrices [R, R] in the temporary of the cores' gradient: 8 MB at R=64, 32 MB at R=128, however many tokens. About
# four programs for each of the 132 multiprocessors of an H100 or H200.
MOST_PARTIAL_SUMS = 512
LEAST_STEPS = 4  # blocks of tokens per partial sum, so that reading them outweighs writing the sum


def forward(h: torch.Tensor, p: torch.Tensor, cores: torch.Tensor, scale: float) -> torch.Tensor:
    """h [N, R], p [N, E], cores [E, R, R] -> s * sum_e p_e (h C_e), [N, R] in h's dtype.

    Operands of the products are rounded to h's dtype as in the torch path, everything else is fp32.
    """
    return (_forward_op if torch.compiler.is_compiling() else _forward)(h, p, cores, scale)


def backward(
    h: torch.Tensor,
    p: torch.Tensor,
    cores: torch.Tensor,
    grad_o: torch.Tensor,
    scale: float,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The gradients of h, p and cores that are needed, each in its tensor's dtype; grad_o is [N, R]."""
    run = _backward_op if torch.compiler.is_compiling() else _backward
    gradients = run(h, p, cores, grad_o, scale, *needs)
    return tuple(gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True))


def splits(n: int, experts: int, tokens: int) -> tuple[int, int]:
    """(partial sums, steps of ``tokens`` tokens in each) for the cores' gradient over n tokens."""
    blocks = triton.cdiv(n, tokens)
    steps = max(LEAST_STEPS, triton.cdiv(blocks, max(1, MOST_PARTIAL_SUMS // experts)))
    return triton.cdiv(blocks, steps), steps


def _mix_kernel(
    h, p, cores, o, n, scale,
    R: tl.constexpr, E: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.arange(0, PADDED)
    used = columns < R
    block = rows[:, None] * R + columns[None, :]
    inside = (rows < n)[:, None] & used[None, :]
    token = tl.load(h + block, mask=inside, other=0.0)
    if WIDEN:
        token = token.to(tl.float32)
    total = tl.full([TOKENS, PADDED], 0.0, tl.float32)
    for e in range(E):
        entries = e * R * R + columns[:, None] * R + columns[None, :]
        core = tl.load(cores + entries, mask=used[:, None] & used[None, :], other=0.0).to(h.dtype.element_ty)
        if WIDEN:
            core = core.to(tl.float32)
        gate = tl.load(p + rows * E + e, mask=rows < n, other=0.0).to(tl.float32)
        total += gate[:, None] * tl.dot(token, core, input_precision=PRECISION)
    tl.store(o + block, (total * scale).to(o.dtype.element_ty), mask=inside)


def _token_gradients_kernel(
    h, p, cores, grad_o, grad_h, grad_p, n, scale,
    NEEDS_H: tl.constexpr, NEEDS_P: tl.constexpr,
    R: tl.constexpr, E: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """grad_h = s sum_e p_e u_e and grad_p_e = s u_e h^T, from u_e = grad_o C_e^T."""
    rows = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.arange(0, PADDED)
    used = columns < R
    block = rows[:, None] * R + columns[None, :]
    inside = (rows < n)[:, None] & used[None, :]
    above = tl.load(grad_o + block, mask=inside, other=0.0)
    if WIDEN:
        above = above.to(tl.float32)
    if NEEDS_P:
        token = tl.load(h + block, mask=inside, other=0.0).to(tl.float32)
    total = tl.full([TOKENS, PADDED], 0.0, tl.float32)
    for e in range(E):
        entries = e * R * R + columns[:, None] * R + columns[None, :]
        core = tl.load(cores + entries, mask=used[:, None] & used[None, :], other=0.0).to(h.dtype.element_ty)
        if WIDEN:
            core = core.to(tl.float32)
        u = tl.dot(above, tl.trans(core), input_precision=PRECISION)
        if NEEDS_H:
            gate = tl.load(p + rows * E + e, mask=rows < n, other=0.0).to(tl.float32)
            total += gate[:, None] * u
        if NEEDS_P:
            # tl.sum, but usable in the interpreter even where triton was imported before TRITON_INTERPRET was set
            inner = tl.reduce(u * token, 1, tl.standard._sum_combine) * scale
            tl.store(grad_p + rows * E + e, inner.to(grad_p.dtype.element_ty), mask=rows < n)
    if NEEDS_H:
        tl.store(grad_h + block, (total * scale).to(grad_h.dtype.element_ty), mask=inside)


def _core_gradients_kernel(
    h, p, grad_o, partial, n, steps, scale,
    R: tl.constexpr, E: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """partial [S, E, R, R]: s sum_n (p_ne h_n)^T grad_o_n over the tokens of a split.

    The experts of a split run side by side, so that its tokens come from memory once and then from the L2 cache.
    """
    e = tl.program_id(0)
    split = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, PADDED)
    used = columns < R
    total = tl.full([PADDED, PADDED], 0.0, tl.float32)
    for step in range(steps):
        rows = (split * steps + step) * TOKENS + tl.arange(0, TOKENS)
        block = rows[:, None] * R + columns[None, :]
        inside = (rows < n)[:, None] & used[None, :]
        token = tl.load(h + block, mask=inside, other=0.0).to(tl.float32)
        above = tl.load(grad_o + block, mask=inside, other=0.0)
        gate = tl.load(p + rows * E + e, mask=rows < n, other=0.0).to(tl.float32)
        weighted = (gate[:, None] * token).to(h.dtype.element_ty)
        if WIDEN:
            weighted = weighted.to(tl.float32)
            above = above.to(tl.float32)
        total += tl.dot(tl.trans(weighted), above, input_precision=PRECISION)
    entries = (split * E + e) * R * R + columns[:, None] * R + columns[None, :]
    tl.store(partial + entries, total * scale, mask=used[:, None] & used[None, :])


def _forward(h: torch.Tensor, p: torch.Tensor, cores: torch.Tensor, scale: float) -> torch.Tensor:
    if not _interpreted():
        _check_once(h, p, cores)
    return _mixture(h, p, cores, scale)


_checked: set[Hashable] = set()


def _check_once(h: torch.Tensor, p: torch.Tensor, cores: torch.Tensor) -> None:
    key = (h.device, h.dtype, cores.dtype, cores.shape, _precision())
    if key not in _checked and not torch.cuda.is_current_stream_capturing():
        check_kernels(_mixture, _backward, h, p, cores)
        _checked.add(key)


def _mixture(h: torch.Tensor, p: torch.Tensor, cores: torch.Tensor, scale: float) -> torch.Tensor:
    given = Operands(h.contiguous(), p.contiguous(), cores.contiguous())
    (o,) = _run(functools.partial(_mix, scale), _tiles(h.dtype), given, "mix")
    return o


def _backward(
    h: torch.Tensor,
    p: torch.Tensor,
    cores: torch.Tensor,
    grad_o: torch.Tensor,
    scale: float,
    needs_h: bool,
    needs_p: bool,
    needs_cores: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An empty tensor in place of each gradient that is not needed: an operator cannot return None."""
    given = Operands(h.contiguous(), p.contiguous(), cores.contiguous(), grad_o.contiguous())
    grad_h, grad_p, grad_cores = h.new_empty(0), p.new_empty(0), cores.new_empty(0)
    if needs_h or needs_p:
        launch = functools.partial(_token_gradients, scale, needs_h, needs_p)
        grad_h, grad_p = _run(launch, _tiles(h.dtype), given, "tokens", needs_h, needs_p)
    if needs_cores:
        tiles = CORE_TILES_FP32 if h.dtype == torch.float32 else CORE_TILES
        (partial,) = _run(functools.partial(_core_gradients, scale), tiles, given, "cores")
        grad_cores = partial.sum(0).to(cores.dtype)
    return grad_h, grad_p, grad_cores


def _tiles(dtype: torch.dtype) -> tuple[Tile, ...]:
    return TOKEN_TILES_FP32 if dtype == torch.float32 else TOKEN_TILES


def _run(launch: Launch, tiles: Sequence[Tile], given: Operands, *kind: Hashable) -> list[torch.Tensor]:
    """Launch with the best tile known."""
    if _interpreted() or given.h.shape[0] == 0:
        return launch(tiles[0], given)
    with torch.cuda.device_of(given.h):
        key = (*kind, given.h.device, given.h.dtype, given.cores.dtype, given.cores.shape, _precision())
        return launch(tile_for(key, tiles, launch, given), given)


def _mix(scale: float, tile: Tile, given: Operands) -> list[torch.Tensor]:
    n = given.h.shape[0]
    o = torch.empty_like(given.h)
    _start(_mix_kernel, (triton.cdiv(n, tile.tokens),), tile, given, *given[:3], o, n, scale)
    return [o]


def _token_gradients(scale: float, needs_h: bool, needs_p: bool, tile: Tile, given: Operands) -> list[torch.Tensor]:
    n = given.h.shape[0]
    outputs = [like.new_empty(like.shape if needed else 0) for like, needed in ((given.h, needs_h), (given.p, needs_p))]
    _start(
        _token_gradients_kernel, (triton.cdiv(n, tile.tokens),), tile, given, *given, *outputs, n, scale,
        NEEDS_H=needs_h, NEEDS_P=needs_p,
    )  # fmt: skip
    return outputs


def _core_gradients(scale: float, tile: Tile, given: Operands) -> list[torch.Tensor]:
    """Partial sums [S, E, R, R] in fp32."""
    n, (experts, r, _) = given.h.shape[0], given.cores.shape
    parts, steps = splits(n, experts, tile.tokens)
    partial = given.h.new_empty((parts, experts, r, r), dtype=torch.float32)
    _start(
        _core_gradients_kernel, (experts, parts), tile, given, given.h, given.p, given.grad_o, partial, n, steps, scale
    )
    return [partial]


def _start(
    kernel: Callable, grid: tuple[int, ...], tile: Tile, given: Operands, *arguments: object, **constants: bool
) -> None:
    if given.h.shape[0] == 0:
        return
    experts, r = given.cores.shape[:2]
    interpreted = _interpreted()
    _jit(kernel, interpreted)[grid](
        *arguments,
        **constants,
        R=r,
        E=experts,
        PADDED=max(16, triton.next_power_of_2(r)),  # a tensor core takes no side under 16
        TOKENS=tile.tokens,
        PRECISION=_precision(),
        # the interpreter multiplies the bits of bf16 as if they were integers
        WIDEN=interpreted and given.h.dtype == torch.bfloat16,
        num_warps=tile.warps,
        num_stages=tile.stages,
        # triton 3.9 warns where it is left open, and from 3.10 on the default is another
        enable_fp_fusion=True,
    )


def _precision() -> str:
    """fp32 products as torch.set_float32_matmul_precision has it for cuBLAS: exact unless it allows less."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _jit(kernel: Callable, interpreted: bool) -> Callable:
    """The kernel compiled, or interpreted: triton decides by TRITON_INTERPRET when it wraps the function."""
    # a batch of another length needs no other binary
    return triton.jit(kernel, do_not_specialize=["n", "steps"] if kernel is _core_gradients_kernel else ["n"])


# For torch.compile, which cannot look into the tuner: to it each pass is one opaque operator.
_forward_op = torch.library.custom_op("comol_ds::mix_cores", _forward, mutates_args=())
_backward_op = torch.library.custom_op("comol_ds::mix_cores_backward", _backward, mutates_args=())


@_forward_op.register_fake
def _(h, p, cores, scale):
    return h.new_empty(h.shape)


@_backward_op.register_fake
def _(h, p, cores, grad_o, scale, needs_h, needs_p, needs_cores):
    return tuple(
        like.new_empty(like.shape if needed else 0)
        for like, needed in ((h, needs_h), (p, needs_p), (cores, needs_cores))
    )
