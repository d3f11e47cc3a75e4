"""The mixture's Triton kernels against the equation itself, on the GPU that is to run them, before their first result.

Kernels that no test has seen on this GPU, driver and triton must not train a model wrongly without a word. Once per
process and size; 160 tokens, a few milliseconds beside the seconds of compiling.

Glossary: N tokens, R rank, E experts.
"""

from collections.abc import Callable

import torch

from comol_ds.errors import UserError

CHECKED_TOKENS = 160  # ragged: no multiple of a tile of 64 tokens
# Relative errors, Frobenius: the operands' rounding with room for another order of sums, and far below any real fault.
_MOST_ERROR = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 1e-4}
_MOST_ERROR_TF32 = 2**-8

Pass = Callable[..., object]


def check_kernels(forward: Pass, backward: Pass, h: torch.Tensor, p: torch.Tensor, cores: torch.Tensor) -> None:
    """Refuse kernels that compute something else than o = s sum_e p_e (h C_e) and its gradients.

    Args:
        forward: (h, p, cores, s) -> o.
        backward: (h, p, cores, grad_o, s, True, True, True) -> gradients of h, p and cores.
        h, p, cores: [N, R], [N, E], [E, R, R]; only their sizes, dtypes and device count.

    Raises:
        UserError: naming what is wrong, and the way around the kernels.
    """
    s = 0.5
    given = _random(h, p, cores)
    grad_o = given[0].flip(0).contiguous()
    found = (forward(*given, s), *backward(*given, grad_o, s, True, True, True))
    names = ("o", "grad_h", "grad_p", "grad_cores")
    for name, mine, expected in zip(names, found, _literal(*given, grad_o, s), strict=True):
        error = ((mine.double() - expected).norm() / expected.norm()).item()
        if not error <= _tolerance(h.dtype):
            raise UserError(
                f"the Triton kernels compute {name} wrongly on this GPU: relative error {error:.1e} at"
                f" r={cores.shape[1]}, {cores.shape[0]} experts, {h.dtype}; set COMOL_KERNEL=torch, and report it"
            )


def _random(h: torch.Tensor, p: torch.Tensor, cores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)  # on the CPU: the training's random numbers stay as they are
    experts, r, _ = cores.shape
    shapes = (CHECKED_TOKENS, r), (CHECKED_TOKENS, experts), (experts, r, r)
    tokens, logits, matrices = (torch.randn(shape, generator=generator) for shape in shapes)
    return tokens.to(h), torch.softmax(logits, dim=1).to(p), (matrices / r**0.5).to(cores)


def _literal(
    h: torch.Tensor, p: torch.Tensor, cores: torch.Tensor, grad_o: torch.Tensor, s: float
) -> tuple[torch.Tensor, ...]:
    """o and the gradients of h, p, cores in float64; cores are rounded to h's dtype first, as the kernels do."""
    cores = cores.to(h.dtype)
    with torch.enable_grad():
        leaves = [tensor.detach().double().requires_grad_() for tensor in (h, p, cores)]
        o = s * torch.einsum("ne,nr,erq->nq", leaves[1], leaves[0], leaves[2])
        gradients = torch.autograd.grad(o, leaves, grad_o.double())
    return (o.detach(), *gradients)


def _tolerance(dtype: torch.dtype) -> float:
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return _MOST_ERROR_TF32
    return _MOST_ERROR[dtype]
