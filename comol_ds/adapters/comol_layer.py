"""CoMoL (arXiv 2603.00573): its parameter table, and the layer that wraps a base Linear.

    h = D(x) A^T      p = softmax(h R^T)      y = x W^T + s * (h sum_e p_e C_e) B^T

Glossary: N tokens, I in_features, O out_features, R rank, E experts, D dropout, s = lora_alpha / r. The router's matrix
R of the equation is `comol_router`, the stack of the C_e is `comol_cores`.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from comol_ds.adapters.initializers import CORE_INITIALIZERS, kaiming_uniform_fan_in
from comol_ds.adapters.mixing import mix_cores
from comol_ds.adapters.routing import CoreOutput, Gates, InputDropout, PartialSums, Routed
from comol_ds.adapters.table import AdapterParameter, AxisSizes, Table, parameter_names
from comol_ds.errors import UserError

ADAPTER = "default"  # PEFT's name for the adapter that get_peft_model attaches
BASE_ROW = "__base__"  # PEFT's name, in a mixed batch, of a row without any adapter
KEY_PREFIX = "base_model.model."  # PEFT's, before a module's path in the base

NO_MERGE = (
    "CoMoL has no exact merge: its core sum_e p_e C_e differs from token to token, a merged weight does not; use the "
    "adapter beside its base, or a static approximation, which is an export of its own "
    "(python launch/export.py --checkpoint ADAPTER --format lora or merged)"
)


def comol_table(
    router: str = "core", core_init: str = "paper", init_adapter_weights: bool = True
) -> tuple[AdapterParameter, ...]:
    """CoMoL's parameters, in the order in which they are drawn.

    Args:
        router: "core" or "input": whether the router reads h [R] or x [I].
        core_init: "paper", "orthogonal" or "identity", see CoMoLConfig.
        init_adapter_weights: False draws B too instead of zeros.
    """
    router_input = {"core": "R", "input": "I"}[router]
    up_init = nn.init.zeros_ if init_adapter_weights else kaiming_uniform_fan_in
    return (
        AdapterParameter("comol_A", ("R", "I"), kaiming_uniform_fan_in),
        AdapterParameter("comol_B", ("O", "R"), up_init),
        AdapterParameter("comol_cores", ("E", "R", "R"), CORE_INITIALIZERS[core_init]),
        AdapterParameter("comol_router", ("E", router_input), kaiming_uniform_fan_in),
    )


class CoMoLLinear(nn.Module, BaseTunerLayer):
    """A base Linear with any number of named CoMoL adapters beside it.

    Attributes:
        gates: parameterless module whose output is p [..., E]; hook it to watch the router.
        core_output: parameterless module whose output is s * h M [..., R]; hook it to measure the update.
        partial_sums: seam before routing, for a row-parallel base.
        input_dropout: seam for dropout on x, for a row-parallel base.
        shared_down: seam for layers that read one x: (layer, x, adapter's name) -> x times each of `input_weights`.
        tables: adapter name -> its parameter table.
        mixed_names: during the forward of a mixed batch, the adapter of each row; the seams behind the down-projection
            then see an adapter's own rows only. None otherwise.
    """

    adapter_layer_names: ClassVar[tuple[str, ...]] = parameter_names(comol_table())
    other_param_names: ClassVar[tuple[str, ...]] = (
        "r",
        "num_experts",
        "scaling",
        "router",
        "paper_dropout",
        "dropout",
        "tables",
    )

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        # Not weight.shape: under ZeRO-3 a weight that is not gathered has shape (0,).
        self.in_features = base_layer.in_features
        self.out_features = base_layer.out_features
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.dropout = nn.ModuleDict()
        self.gates = Gates()
        self.core_output = CoreOutput()
        self.partial_sums = PartialSums()
        self.input_dropout = InputDropout()
        self.shared_down: Callable[[CoMoLLinear, torch.Tensor, str], list[torch.Tensor]] | None = None
        self.r: dict[str, int] = {}
        self.num_experts: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.router: dict[str, str] = {}
        self.paper_dropout: dict[str, bool] = {}
        self.tables: dict[str, Table] = {}
        self.mixed_names: tuple[str, ...] | None = None
        self._disable_adapters = False
        self.merged_adapters = []

    def add_adapter(
        self,
        adapter_name: str,
        *,
        r: int,
        lora_alpha: float,
        num_experts: int,
        router: str = "core",
        core_init: str = "paper",
        lora_dropout: float = 0.0,
        dropout_scheme: str = "input",
        init_adapter_weights: bool = True,
    ) -> None:
        """Create an adapter of this name, or replace it. Arguments as in CoMoLConfig.

        Parameters are created in fp32 (float64 beside a float64 base) on the base weight's device by `draw_parameters`.
        """
        self.r[adapter_name] = r
        self.num_experts[adapter_name] = num_experts
        self.scaling[adapter_name] = lora_alpha / r
        self.router[adapter_name] = router
        self.paper_dropout[adapter_name] = dropout_scheme == "paper" and lora_dropout > 0
        self.dropout[adapter_name] = nn.Dropout(lora_dropout) if lora_dropout > 0 else nn.Identity()
        self.tables[adapter_name] = comol_table(router, core_init, init_adapter_weights)
        device, base_dtype = self._get_base_layer_device_and_dtype(self.base_layer)
        dtype = torch.float64 if base_dtype == torch.float64 else torch.float32
        sizes = AxisSizes(self.in_features, self.out_features, r, num_experts)
        for parameter in self.tables[adapter_name]:
            tensor = torch.empty(parameter.shape(sizes), dtype=dtype, device=device)
            getattr(self, parameter.name)[adapter_name] = nn.Parameter(tensor)
        self.draw_parameters(adapter_name, device)
        self.set_adapter(self.active_adapters)

    def draw_parameters(
        self,
        adapter_name: str,
        device: torch.device,
        keep: Callable[[AdapterParameter, torch.Tensor], torch.Tensor] = lambda parameter, whole: whole,
    ) -> None:
        """Draw the initial values, one whole tensor after the other in the table's order.

        Always on the CPU and always whole: a seed gives the same adapter on every device and however it is sharded. On
        meta nothing is drawn.

        Args:
            adapter_name: an adapter that `add_adapter` declared.
            device: where the parameters go.
            keep: what to keep of each whole tensor.
        """
        for parameter in self.tables[adapter_name]:
            declared = getattr(self, parameter.name)[adapter_name]
            where = "meta" if device.type == "meta" else "cpu"
            whole = torch.empty(declared.shape, dtype=declared.dtype, device=where)
            if where != "meta":
                parameter.initialize(whole)
            kept = nn.Parameter(keep(parameter, whole).to(device), requires_grad=declared.requires_grad)
            getattr(self, parameter.name)[adapter_name] = kept

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move, but keep the dtype: PEFT's own version would round fresh fp32 adapters to a bf16 base's dtype."""
        base_device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        for name in self.adapter_layer_names:
            parameters = getattr(self, name)
            if adapter_name in parameters and parameters[adapter_name].device.type != "meta":
                parameters[adapter_name] = parameters[adapter_name].to(device or base_device)

    def forward(
        self, x: torch.Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """x [..., I] -> [..., O] in the base's output dtype; the active adapters' updates add up.

        Args:
            x: the input.
            args, kwargs: for the base.
            adapter_names: PEFT's mixed batch: for each row of x [B, ..., I] the one adapter that it goes through, or
                BASE_ROW, in place of the active ones.

        Raises:
            ValueError: adapter_names does not have one name per row.
        """
        if adapter_names is not None:
            self._check_mixed_batch(x, adapter_names)
        y = self.base_layer(x, *args, **kwargs)
        if adapter_names is not None and not self.disable_adapters:
            return self._mixed_batch_forward(x, y, adapter_names)
        active = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.comol_A]
        y, routed = self.partial_sums(y, [self._down(x, name) for name in active])
        for adapter_name, (h, logits) in zip(active, routed, strict=True):
            y = y + self._up(h, logits, adapter_name).to(y.dtype)
        return y

    def _mixed_batch_forward(self, x: torch.Tensor, y: torch.Tensor, adapter_names: Sequence[str]) -> torch.Tensor:
        """Each adapter's update on its own rows: x [B, ..., I], y [B, ..., O] of the base, B names -> y + updates."""
        rows = {
            name: torch.tensor([row for row, its in enumerate(adapter_names) if its == name], device=x.device)
            for name in dict.fromkeys(adapter_names)
            if name in self.comol_A
        }
        self.mixed_names = tuple(adapter_names)
        try:
            y, routed = self.partial_sums(y, [self._down(x[own], name) for name, own in rows.items()])
            for (name, own), (h, logits) in zip(rows.items(), routed, strict=True):
                y = y.index_add(0, own, self._up(h, logits, name).to(y.dtype))
            return y
        finally:
            self.mixed_names = None

    def _check_mixed_batch(self, x: torch.Tensor, adapter_names: Sequence[str]) -> None:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )

    def update(self, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """The adapter path alone, unsharded: x [..., I] -> s * (h sum_e p_e C_e) B^T, [..., O]."""
        return self._up(*self._down(x, adapter_name), adapter_name)

    def input_weights(self, adapter_name: str) -> list[nn.Parameter]:
        """What multiplies x: A [R, I], and the router [E, I] if it reads x."""
        routes_on_x = self.router[adapter_name] == "input"
        return [self.comol_A[adapter_name], *([self.comol_router[adapter_name]] if routes_on_x else [])]

    def _down(self, x: torch.Tensor, adapter_name: str) -> Routed:
        """x [..., I] -> h [..., R], and the logits [..., E] if they are formed from x."""
        drops = self.training and isinstance(self.dropout[adapter_name], nn.Dropout)
        alone = self.shared_down is None or self.mixed_names is not None  # siblings would each bring their own x[rows]
        if alone or drops or torch.compiler.is_compiling():
            down, *router = self.input_weights(adapter_name)
            x = self._cast_input_dtype(x, down.dtype)
            h = F.linear(self.input_dropout(x, self.dropout[adapter_name]), down)
            logits = [F.linear(x, weight) for weight in router]
        else:
            h, *logits = self.shared_down(self, x, adapter_name)
        return h, logits[0] if logits else None

    def _up(self, h: torch.Tensor, logits: torch.Tensor | None, adapter_name: str) -> torch.Tensor:
        """Whole h [..., R] and logits [..., E] -> s * (h sum_e p_e C_e) B^T, [..., O]."""
        if logits is None:
            logits = F.linear(h, self.comol_router[adapter_name])
        o = self._mix(h, self.gates(logits, h.dtype, adapter_name), adapter_name)
        return F.linear(self.core_output(o, adapter_name), self.comol_B[adapter_name])

    def _mix(self, h: torch.Tensor, p: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """h [..., R], p [..., E] -> s * h sum_e p_e C_e, [..., R]."""
        cores, scale = self.comol_cores[adapter_name], self.scaling[adapter_name]
        if not (self.training and self.paper_dropout[adapter_name]):
            return mix_cores(h, p, cores, scale)
        drop = self.dropout[adapter_name]
        merged = torch.matmul(p, cores.flatten(1).to(p.dtype)).unflatten(-1, cores.shape[1:])  # [..., R, R]
        return drop(torch.matmul(h.unsqueeze(-2), drop(merged)).squeeze(-2)) * scale

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Always raises UserError: there is no weight that does for every token what the adapter does."""
        raise UserError(NO_MERGE)

    def unmerge(self) -> None:
        """Always raises UserError: nothing can have been merged."""
        raise UserError(f"nothing to unmerge: {NO_MERGE}")

    def __repr__(self) -> str:
        return "comol." + super().__repr__()


def comol_layers(model: nn.Module, adapter_name: str = ADAPTER) -> dict[str, CoMoLLinear]:
    """The layers that have this adapter, by their module path in the base model.

    Raises:
        UserError: there are none.
    """
    layers = {
        name.removeprefix(KEY_PREFIX): layer
        for name, layer in model.named_modules()
        if isinstance(layer, CoMoLLinear) and adapter_name in layer.tables
    }
    if not layers:
        raise UserError(f"the model has no CoMoL layer with an adapter named {adapter_name!r}")
    return layers
