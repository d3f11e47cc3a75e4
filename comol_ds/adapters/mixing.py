"""The core-space mixture o = s * sum_e p_e (h C_e) of CoMoL (arXiv 2603.00573) as one differentiable operation.

The paper's form merges M = sum_e p_e C_e per token and multiplies h M: an [N, R, R] tensor, 128 KB per token in fp32 at
R=64, E=8 before autograd keeps anything. Since h M = sum_e p_e (h C_e), the same numbers come out of one GEMM of
(p outer h), [N, E*R], with the stacked cores viewed as [E*R, R]. The outer product is cheap to form, so backward forms
it again: only h and p stay alive between the passes, and both are tensors that routing keeps anyway.

On a GPU Triton kernels do the same without writing the outer product to memory, where triton is installed; the
environment variable COMOL_KERNEL says otherwise, see `takes_triton`.

Glossary: N tokens, R rank, E experts, s = lora_alpha / r.
"""

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import torch
from torch.autograd.function import once_differentiable

from comol_ds.errors import UserError

KERNEL_VARIABLE = "COMOL_KERNEL"
KERNELS = ("torch", "triton")
HAS_TRITON = find_spec("triton") is not None
# At R=256 a core in fp32 is 256 KB, more than the shared memory of any multiprocessor.
MOST_TRITON_RANK = 128

# Elements of the temporary outer product [chunk, E*R], 32 MB in fp32. It bounds memory and costs no time: at N=2048,
# R=64, E=8 on 2 cores, forward + backward took 6.0 ms in one chunk of 2^20 and 6.8 ms in chunks of 2^17.
CHUNK_ELEMENTS = 1 << 23


def mix_cores(h: torch.Tensor, p: torch.Tensor, cores: torch.Tensor, scale: float) -> torch.Tensor:
    """o = scale * sum_e p_e (h C_e), row-vector form.

    Args:
        h: [..., R] down-projected tokens; their dtype is the compute dtype.
        p: [..., E] gates, same leading shape and dtype as h.
        cores: [E, R, R], cast to h's dtype if it has another one; its gradient comes back in its own dtype.
        scale: s = lora_alpha / r, applied here because o is the narrowest tensor of the path.

    Returns:
        [..., R], dtype of h.

    Raises:
        UserError: COMOL_KERNEL is no kernel, or one that cannot run here.
    """
    leading = h.shape[:-1]
    triton = takes_triton(h.device.type, (h.dtype, cores.dtype), h.shape[-1])
    o = _MixCores.apply(h.reshape(-1, h.shape[-1]), p.reshape(-1, p.shape[-1]), cores, scale, triton)
    return o.view(*leading, cores.shape[-1])


@torch.compiler.assume_constant_result
def takes_triton(device_type: str, dtypes: tuple[torch.dtype, torch.dtype], rank: int) -> bool:
    """Whether the Triton kernels mix tokens and cores of these dtypes, [N, R] and [E, R, R].

    COMOL_KERNEL=torch never takes them; triton does or says why it cannot, and leaves only float64, which they do not
    have, to torch; unset, they are taken on a GPU of compute capability 8.0 or later for R up to 128. Read at every
    call, but once only by torch.compile.

    Raises:
        UserError: COMOL_KERNEL is no kernel, or triton where it cannot run.
    """
    asked = os.environ.get(KERNEL_VARIABLE)
    if asked is not None and asked not in KERNELS:
        raise UserError(f"{KERNEL_VARIABLE}={asked} is no kernel: set it to {' or '.join(KERNELS)}, or unset it")
    if asked == "torch" or torch.float64 in dtypes:
        return False
    if asked is None:
        able = HAS_TRITON and device_type == "cuda" and rank <= MOST_TRITON_RANK
        return able and torch.cuda.get_device_capability() >= (8, 0)
    obstacle = _obstacle_to_triton(device_type, rank)
    if obstacle:
        raise UserError(f"{KERNEL_VARIABLE}=triton, but {obstacle}, or unset {KERNEL_VARIABLE}")
    return True


def _obstacle_to_triton(device_type: str, rank: int) -> str | None:
    if not HAS_TRITON:
        return "triton is not installed: install it"
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on the {device_type}: set TRITON_INTERPRET=1 for Triton's interpreter, for tests only"
    if rank > MOST_TRITON_RANK:
        return f"r is {rank}: set r to at most {MOST_TRITON_RANK}"
    return None


class _MixCores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, p, cores, scale, triton):  # [N, R], [N, E], [E, R, R]
        ctx.save_for_backward(h, p, cores)
        ctx.scale, ctx.triton = scale, triton
        forward, _ = _passes(triton)
        with torch.autocast(h.device.type, enabled=False):
            return forward(h, p, cores, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_o):  # [N, R]
        h, p, cores = ctx.saved_tensors
        _, backward = _passes(ctx.triton)
        with torch.autocast(h.device.type, enabled=False):
            return *backward(h, p, cores, grad_o, ctx.scale, ctx.needs_input_grad[:3]), None, None


def _passes(triton: bool) -> tuple[Callable, Callable]:
    if not triton:
        return _forward, _backward
    from comol_ds.adapters import mixing_triton  # loads triton, which CPU machines have no use for

    return mixing_triton.forward, mixing_triton.backward


def _forward(h: torch.Tensor, p: torch.Tensor, cores: torch.Tensor, scale: float) -> torch.Tensor:
    stacked = _stacked(cores, h.dtype)  # [E*R, R]
    parts = [_outer(p[rows], h[rows]) @ stacked for rows in _chunks(h, stacked.shape[0])]
    return _joined(parts).mul_(scale)


def _backward(
    h: torch.Tensor,
    p: torch.Tensor,
    cores: torch.Tensor,
    grad_o: torch.Tensor,
    scale: float,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    needs_h, needs_p, needs_cores = needs
    stacked = _stacked(cores, h.dtype)
    grad_o = grad_o * scale
    grad_h, grad_p, grad_cores = [], [], None
    for rows in _chunks(h, stacked.shape[0]):
        if needs_cores:
            # Chunks are summed in the parameter's dtype: fp32 under autocast and for bf16 activations.
            product = (_outer(p[rows], h[rows]).t() @ grad_o[rows]).to(cores.dtype)  # [E*R, R]
            grad_cores = product if grad_cores is None else grad_cores + product
        if needs_h or needs_p:
            u = (grad_o[rows] @ stacked.t()).unflatten(1, cores.shape[:2])  # [n, E, R]
        if needs_h:
            grad_h.append(torch.bmm(p[rows].unsqueeze(1), u).squeeze(1))
        if needs_p:
            grad_p.append(torch.bmm(u, h[rows].unsqueeze(2)).squeeze(2))
    return _joined(grad_h), _joined(grad_p), grad_cores.view_as(cores) if needs_cores else None


def _joined(parts: list[torch.Tensor]) -> torch.Tensor | None:
    """The chunks' rows one below the other; of one chunk itself, of none None."""
    return torch.cat(parts) if len(parts) > 1 else next(iter(parts), None)


def _stacked(cores: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return cores.to(dtype).reshape(-1, cores.shape[-1])  # [E*R, R]


def _outer(p: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    if h.device.type == "cpu" and h.dtype.itemsize == 2:
        # The same bits, since fp32 holds the product of two such numbers exactly: 0.08 ms at N=512, R=16, E=32 on one
        # core, where torch's broadcast product of bf16 takes 0.43.
        return (p.float().unsqueeze(2) * h.float().unsqueeze(1)).to(h.dtype).flatten(1)
    return (p.unsqueeze(2) * h.unsqueeze(1)).flatten(1)  # [n, E*R]


def _chunks(h: torch.Tensor, width: int) -> Iterator[slice]:
    """Row ranges, at least one, whose outer product of this width has at most CHUNK_ELEMENTS."""
    rows = max(1, CHUNK_ELEMENTS // width)
    return (slice(start, start + rows) for start in range(0, max(1, h.shape[0]), rows))
