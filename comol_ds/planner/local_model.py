"""The model as one rank holds it, without memory: built by the functions that build the real one.

Tensor parallelism gets a mesh whose group is a stand-in: it has a size, and notes what it would have communicated.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from comol_ds.base_config import build_here
from comol_ds.layout import RankGrid
from comol_ds.parallel.activations import check_activations
from comol_ds.parallel.assemble import attach_adapter, build_skeleton, give_ranks_their_part
from comol_ds.parallel.mesh import Mesh
from comol_ds.parallel.tp_plan import check_placement, place_linears
from comol_ds.parallel.tp_proof import prove_placement
from comol_ds.parallel.vocabulary import Vocabulary
from comol_ds.parallel.zero_partition import count_parameters
from comol_ds.planner.request import Request


class NotedGroup(dist.ProcessGroup):
    """A group of ranks that do not exist. All-reduces return at once.

    Attributes:
        sent: bytes of each all-reduced tensor, in order.
    """

    def __init__(self, size: int) -> None:
        super().__init__(0, size)
        self.sent: list[int] = []

    def allreduce(self, tensors: list[torch.Tensor], options: object = None) -> None:
        self.sent += [tensor.numel() * tensor.element_size() for tensor in tensors]


class PlannedMesh(Mesh):
    """The mesh of a world that does not exist."""

    def __init__(self, grid: RankGrid) -> None:
        self.grid = grid
        self.tensor_group = NotedGroup(grid.tensor_parallel) if grid.tensor_parallel > 1 else None
        self.data_group = None


@dataclass(frozen=True)
class LocalParameter:
    """What a rank holds of one parameter before ZeRO partitions it.

    Attributes:
        name: in the adapted model; of tied weights the first one.
        dims: number of dimensions.
        sharded: every tensor-parallel rank has another slice.
        partial: its gradient is summed over the tensor-parallel ranks once per step.
    """

    name: str
    numel: int
    itemsize: int
    dims: int
    trainable: bool
    sharded: bool
    partial: bool

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize


@dataclass(frozen=True)
class Unit:
    """What ZeRO-3 gathers at once: a decoder layer, or the parameters, if any, that another module holds itself.

    Attributes:
        parameters: what is gathered.
        within: all below the module.
    """

    is_layer: bool
    parameters: tuple[LocalParameter, ...]
    within: tuple[LocalParameter, ...]


@dataclass(frozen=True)
class LocalModel:
    """A rank's model on the meta device.

    Attributes:
        model: adapted and sharded.
        vocabulary: how its logits are spread.
        mesh: its stand-in mesh.
        trainable, everything: numbers of the whole model, over all tensor-parallel ranks.
    """

    model: PeftModel
    vocabulary: Vocabulary
    mesh: PlannedMesh
    trainable: int
    everything: int

    @cached_property
    def layers(self) -> dict[str, nn.Module]:
        """The decoder layers by name."""
        return {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, GradientCheckpointingLayer)
        }

    @property
    def layer_kinds(self) -> list[str]:
        """What the configuration tells apart by layer, such as sliding and full attention."""
        kinds = getattr(self.model.get_base_model().config.get_text_config(), "layer_types", None)
        return list(kinds or ["layer"] * len(self.layers))

    @property
    def representatives(self) -> int:
        """How many of the first layers stand for all: every kind is among them, and not as the first layer, whose input
        may need no gradient. All, if layers differ in their parameters.
        """
        layers, kinds = list(self.layers.values()), self.layer_kinds
        if _layer_list(self.model) is None or len(kinds) != len(layers):
            return len(layers)
        if any(_signature(layer) != _signature(layers[0]) for layer in layers):
            return len(layers)
        return max((kinds.index(kind, 1) + 1 for kind in set(kinds[1:])), default=1)

    @cached_property
    def parameters(self) -> list[LocalParameter]:
        """Each once, in the order of the modules."""
        return list(self._described.values())

    @cached_property
    def units(self) -> dict[str, Unit]:
        """Of every module but those inside decoder layers, by name; tied weights stand in each unit that uses them."""
        inside = {module for layer in self.layers.values() for module in layer.modules() if module is not layer}
        return {
            name: self._unit(module, is_layer=name in self.layers)
            for name, module in self.model.named_modules()
            if module not in inside
        }

    def _unit(self, module: nn.Module, is_layer: bool) -> Unit:
        own, within = (
            tuple(self._described[id(parameter)] for parameter in module.parameters(recurse=recurse))
            for recurse in (is_layer, True)
        )
        return Unit(is_layer, own, within)

    @cached_property
    def _described(self) -> dict[int, LocalParameter]:
        return {id(parameter): _describe(name, parameter) for name, parameter in self.model.named_parameters()}


def build_local_model(request: Request, first_layers: int | None = None) -> LocalModel:
    """The model of rank 0.

    Args:
        request: the resolved run.
        first_layers: build this many decoder layers only. None: all.

    Raises:
        UserError: a model, plan or adapter that the run would refuse.
    """
    config, tensor_parallel = request.config, request.grid.tensor_parallel
    settings = config.model
    base = build_here(
        lambda attention: build_skeleton(
            replace(settings, attn_implementation=attention), settings.model_name_or_path, bool(settings.bf16)
        ),
        settings.attn_implementation,
    )
    check_activations(base, settings, tensor_parallel)
    if first_layers is not None and (layers := _layer_list(base)) is not None:
        del layers[first_layers:]
    placement = place_linears(base, config.parallel.tp_plan) if tensor_parallel > 1 else None
    if placement is not None:
        check_placement(base, placement, tensor_parallel, config.adapter)
        if first_layers is None:
            prove_placement(base, placement, tensor_parallel, settings.attn_implementation, config.parallel.tp_plan)
    model = attach_adapter(base, config.adapter, config.run.seed)
    trainable, everything = count_parameters(model)
    mesh = PlannedMesh(request.grid)
    vocabulary = give_ranks_their_part(model, placement, mesh, torch.device("meta"), bool(settings.bf16))
    return LocalModel(model.train(), vocabulary, mesh, trainable, everything)


def _layer_list(model: nn.Module) -> nn.ModuleList | None:
    """The list that holds all decoder layers, if one does."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return next((module for module in lists if layers and list(module) == layers), None)


def _signature(layer: nn.Module) -> list[tuple]:
    return [(name, parameter.shape, parameter.requires_grad) for name, parameter in layer.named_parameters()]


def _describe(name: str, parameter: nn.Parameter) -> LocalParameter:
    return LocalParameter(
        name,
        parameter.numel(),
        parameter.element_size(),
        parameter.dim(),
        parameter.requires_grad,
        hasattr(parameter, "shard"),
        getattr(parameter, "gradient_is_partial", False),
    )
