"""In-place initializers of adapter tensors. All draw from the global torch generator of the tensor's device."""

import math
from collections.abc import Callable

import torch

# Entries of the identity initialization's noise, as a fraction of the paper's core entries U(-1/sqrt R, 1/sqrt R).
# At 0.1 the noise has a spectral norm near 0.1 whatever R is: experts differ, and every core stays close to identity.
IDENTITY_NOISE = 0.1


def kaiming_uniform_fan_in(tensor: torch.Tensor) -> torch.Tensor:
    """U(-1/sqrt n, 1/sqrt n) with n the last dimension: kaiming_uniform(a=sqrt 5) of every matrix in a stack.

    torch's own kaiming_uniform_ would take R*R as the fan-in of a stacked [E, R, R] tensor.
    """
    bound = 1 / math.sqrt(tensor.shape[-1])
    with torch.no_grad():
        return tensor.uniform_(-bound, bound)


def orthogonal_cores(cores: torch.Tensor) -> torch.Tensor:
    """Every core [R, R] of cores [E, R, R] a random orthogonal matrix, expert by expert."""
    with torch.no_grad():
        for core in cores:
            torch.nn.init.orthogonal_(core)
    return cores


def identity_cores(cores: torch.Tensor) -> torch.Tensor:
    """Identity plus small noise that sums to zero over the experts: at uniform gates the mixture is exactly LoRA.

    With one expert the centered noise vanishes and the adapter is LoRA.
    """
    kaiming_uniform_fan_in(cores)
    with torch.no_grad():
        cores.sub_(cores.mean(dim=0, keepdim=True)).mul_(IDENTITY_NOISE)
        return cores.add_(torch.eye(cores.shape[-1], dtype=cores.dtype, device=cores.device))


CORE_INITIALIZERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "paper": kaiming_uniform_fan_in,
    "orthogonal": orthogonal_cores,
    "identity": identity_cores,
}
