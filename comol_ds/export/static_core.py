"""A constant core in the place of CoMoL's routed one, for servers that take nothing but a plain LoRA.

CoMoL (arXiv 2603.00573) multiplies each token's h with a core of its own, M = sum_e p_e C_e, so no constant core Mbar
equals it. Over calibration tokens there is a cheap one and a best one:

    mean gate       Mbar = sum_e mean(p_e) C_e
    least squares   Mbar = argmin  sum ||h M - h Mbar||^2  +  ridge ||Mbar - mean-gate core||^2

The ridge decides where the tokens do not (fewer than R of them, directions that no h has), and leads there to the
mean-gate core. It also makes a theorem of "least squares is never worse on its calibration tokens", for any ridge: the
minimum is at most the objective at the mean-gate core, whose penalty is 0.

Glossary: R rank, E experts, s = lora_alpha / r. The sums over tokens come from `core_sums.calibrate`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from peft import PeftModel

from comol_ds.adapters.adapter_folder import KEY_PREFIX, split_tensors
from comol_ds.adapters.comol_layer import ADAPTER, CoMoLLinear, comol_layers
from comol_ds.adapters.config import CoMoLConfig
from comol_ds.errors import UserError
from comol_ds.export.core_sums import Calibration, CoreSums, LayerHooks, check_only_active, hooked
from comol_ds.export.static_lora import StaticLora

# Times the mean eigenvalue of sum h^T h: about the square of what rounding h to bf16 adds (2^-9 / sqrt 3 = 1.1e-3), as
# a server may do. In a direction with less energy than that, a fitted core would multiply noise.
RIDGE = 1e-6

LEAST_SQUARES, MEAN_GATE = "least-squares", "mean-gate"

Cores = Mapping[str, torch.Tensor]  # module path in the base model -> Mbar [R, R], float64 on the CPU


def mean_gate_cores(calibration: Calibration) -> dict[str, torch.Tensor]:
    """Module path -> sum_e mean(p_e) C_e, [R, R] float64."""
    return {name: sums.mean_core for name, sums in calibration.modules.items()}


def least_squares_cores(calibration: Calibration) -> dict[str, torch.Tensor]:
    """Module path -> the core of the smallest sum ||h M - h Mbar||^2, [R, R] float64; see the ridge above.

    With S = sum h^T h, T = sum h^T (h M) and the mean-gate core G: Mbar = G + (S + ridge I)^-1 (T - S G).
    """
    return {name: _least_squares(sums) for name, sums in calibration.modules.items()}


def _least_squares(sums: CoreSums) -> torch.Tensor:
    start = sums.mean_core
    ridge = RIDGE * sums.inputs.diagonal().mean()
    if ridge == 0:  # every h is zero, and so is h M
        return start
    factor = torch.linalg.cholesky(sums.inputs + ridge * torch.eye(len(start), dtype=start.dtype))
    return start + torch.cholesky_solve(sums.products - sums.inputs @ start, factor)


CORES = {LEAST_SQUARES: least_squares_cores, MEAN_GATE: mean_gate_cores}


def residuals(calibration: Calibration, cores: Cores) -> dict[str, float]:
    """Module path -> ||h M - h Mbar||_F / ||h M||_F over the tokens of the calibration; 0 where h M is zero.

    From the sums alone: ||h M||^2 - 2 <T, Mbar> + <Mbar, S Mbar>. Differences of large numbers: below about 1e-7 the
    result is rounding.
    """
    assert calibration.modules.keys() == cores.keys()
    return {name: _residual(sums, cores[name]) for name, sums in calibration.modules.items()}


def _residual(sums: CoreSums, core: torch.Tensor) -> float:
    if sums.squares == 0:
        return 0.0
    error = sums.squares + float((core * (sums.inputs @ core - 2 * sums.products)).sum())
    return (max(error, 0.0) / sums.squares) ** 0.5


def static_lora(tensors: Mapping[str, torch.Tensor], config: CoMoLConfig, cores: Cores) -> StaticLora:
    """The LoRA of constant cores: A as it is, and s B Mbar^T, since (h Mbar) B^T = h (B Mbar^T)^T.

    Args:
        tensors, config: the adapter, as `read_adapter` returns it.
        cores: one for each of its modules.

    Raises:
        UserError: the adapter holds whole trained modules beside its CoMoL tensors.
    """
    modules, others = split_tensors(tensors, config)
    if others:
        first = KEY_PREFIX + next(iter(others))
        raise UserError(
            f"the adapter also holds whole trained modules (modules_to_save), first {first!r}, which a static LoRA"
            " leaves out; export it with --format comol"
        )
    assert modules.keys() == cores.keys()
    scaling = config.lora_alpha / config.r
    down = {module: modules[module]["comol_A"].float() for module in cores}
    up = {module: (scaling * modules[module]["comol_B"].double() @ core.t()).float() for module, core in cores.items()}
    return StaticLora(down, up, config.r)


@contextmanager
def constant_cores(model: PeftModel, cores: Cores, adapter_name: str = ADAPTER) -> Iterator[None]:
    """Inside, the adapter computes with these cores instead of routing: what their static LoRA would compute.

    Args:
        model: a PeftModel with this CoMoL adapter active, and no other.
        cores: one for each of its modules.
        adapter_name: PEFT's name of the adapter.

    Raises:
        UserError: there is no such adapter, or it is not the only active one.
    """
    layers = comol_layers(model, adapter_name)
    assert layers.keys() == cores.keys()
    check_only_active(model, adapter_name)
    with hooked([_ConstantCore(layer, cores[name], adapter_name) for name, layer in layers.items()]):
        yield


class _ConstantCore(LayerHooks):
    def __init__(self, layer: CoMoLLinear, core: torch.Tensor, adapter_name: str) -> None:
        super().__init__(layer, adapter_name)
        self._scaled = self.scaling * core  # [R, R]

    def see(self, h: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
        return h @ self._scaled.to(device=h.device, dtype=h.dtype)
