"""Gives a model that stands on meta this rank's part of a checkpoint, read straight into its final place."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from comol_ds.ds_config import zero_stage
from comol_ds.layout import Shard
from comol_ds.parallel import groups
from comol_ds.parallel.device import device
from comol_ds.parallel.mesh import Mesh
from comol_ds.parallel.weight_reader import Read, read_all
from comol_ds.tensor_files import StoredTensor


def load_weights(model: nn.Module, stored: Mapping[str, StoredTensor], ds_config: dict[str, Any], mesh: Mesh) -> None:
    """Give every parameter on meta memory and values: this rank's slice, under ZeRO-3 its partition of the slice.

    Nothing is sent between the ranks but whether all of them could read. A module to save, the trainable copy of a
    module of the base, starts from the values of the original.

    Args:
        model: parameters on meta with this rank's shapes; others, and buffers, have memory.
        stored: name in the unadapted model -> tensor of the files.
        ds_config: the resolved DeepSpeed dictionary.
        mesh: the ranks.

    Raises:
        UserError: on every rank, if one cannot read a file.
    """
    groups.together("load the weights", lambda: _load(model, stored, ds_config, mesh))


# What a rank holds of a flattened parameter: the number of the first element, and 1-D memory for it and what follows.
Held = list[tuple[int, torch.Tensor]]


@dataclass(frozen=True)
class Allocated:
    """A parameter that has memory by now, and what this rank must fill of it.

    Attributes:
        name: in the unadapted model.
        owner: a module that holds it.
        attribute: its name there.
        shard: this rank's part of it under tensor parallelism, None where it is whole.
        held: memory without values.
    """

    name: str
    owner: nn.Module
    attribute: str
    shard: Shard | None
    held: Held


def allocate_weights(model: nn.Module, ds_config: dict[str, Any], mesh: Mesh) -> Iterator[Allocated]:
    """Give every parameter on meta its memory on this rank, one after the other; buffers move to the device."""
    allocate = ZeroPartitioner(ds_config, mesh) if zero_stage(ds_config) == 3 else _allocate_whole
    for declared, places in _on_meta(model):
        shard = getattr(declared, "shard", None)
        parameter, held = allocate(declared, shard is None)
        for place in places:
            setattr(place.module, place.attribute, parameter)
        yield Allocated(places[0].name, places[0].module, places[0].attribute, shard, held)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device())


def _load(model: nn.Module, stored: Mapping[str, StoredTensor], ds_config: dict[str, Any], mesh: Mesh) -> None:
    reads = [
        Read(stored[allocated.name], allocated.shard, start, memory)
        for allocated in allocate_weights(model, ds_config, mesh)
        for start, memory in allocated.held
    ]
    reads += [
        Read(stored[plain_name(name)], None, 0, buffer.data.view(-1))
        for name, buffer in model.named_buffers()
        if plain_name(name) in stored  # a persistent one
    ]
    read_all(reads, show_progress=mesh.grid.rank == 0)


def _allocate_whole(declared: nn.Parameter, replicated: bool) -> tuple[nn.Parameter, Held]:
    memory = torch.empty(declared.shape, dtype=declared.dtype, device=device())
    return nn.Parameter(memory, declared.requires_grad), [(0, memory.view(-1))]


class ZeroPartitioner:
    """Partitions single parameters as DeepSpeed's zero.Init would, each over the right ranks, without their values.

    zero.Init itself takes values from the group's first rank and broadcasts them: that rank would read everything. And
    its default group is the whole world, which would hand rank 0's slice to all tensor-parallel ranks, silently. So its
    bookkeeping is called without the broadcast, by a private name (``_convert_to_deepspeed_param``, DeepSpeed 0.19),
    here and nowhere else.
    """

    def __init__(self, ds_config: dict[str, Any], mesh: Mesh) -> None:
        """A collective call where DeepSpeed makes groups of its own (hpZ)."""
        self._mesh, self._scratch = mesh, torch.empty(0, dtype=torch.uint8)
        self._init = deepspeed.zero.Init(
            module=nn.Module(),
            config_dict_or_path=ds_config,
            data_parallel_group=mesh.data_group,
            mpu=mesh if mesh.grid.tensor_parallel > 1 else None,
        )

    def __call__(self, declared: nn.Parameter, replicated: bool) -> tuple[nn.Parameter, Held]:
        """A partitioned parameter. A replicated matrix is spread over all ranks, for it is the same on all of them.

        Vectors (norms, biases) stay with the data-parallel ranks: gathered together with their layer's slices they
        cost no collective of their own, and they are a ten-thousandth of the weights.

        Args:
            declared: on meta, with this rank's shape.
            replicated: the same on all tensor-parallel ranks.

        Returns:
            The parameter, and what this rank holds of it, not yet written.
        """
        parameter = nn.Parameter(self._unwritten(declared), declared.requires_grad)
        if replicated and parameter.dim() > 1 and self._mesh.grid.tensor_parallel > 1:
            parameter.ds_zero_partition_process_group = dist.group.WORLD
        self._init._convert_to_deepspeed_param(parameter)
        parameter.partition()
        parts = [(parameter.ds_tensor, parameter.ds_process_group)]
        if parameter.ds_secondary_tensor is not None:  # hpZ's copy within the node, which is what gathers then read
            parts.append((parameter.ds_secondary_tensor, parameter.ds_zero_param_process_group))
        return parameter, [_part(parameter.ds_numel, memory, group) for memory, group in parts]

    def _unwritten(self, declared: nn.Parameter) -> torch.Tensor:
        """Memory of the parameter's size for `partition` to copy from, the same for all: on a CPU its pages are never
        written, so they take no memory, and reading them first costs more than everything else (3.2 s in place of 0.5
        for 0.6 GiB on a virtual machine, if every parameter has its own).
        """
        size = declared.numel() * declared.element_size()
        if self._scratch.numel() < size:
            self._scratch = torch.empty(size, dtype=torch.uint8, device=device())
        return self._scratch[:size].view(declared.dtype).view(declared.shape)


def _part(numel: int, memory: torch.Tensor, group: dist.ProcessGroup) -> tuple[int, torch.Tensor]:
    """Where a rank's part of the flattened parameter starts, and its memory; the padding of the last part is zeroed."""
    start = dist.get_rank(group) * memory.numel()
    held = min(max(numel - start, 0), memory.numel())
    memory[held:].zero_()
    return start, memory[:held]


def plain_name(name: str) -> str:
    """The name in the unadapted model of a parameter of the adapted one."""
    for inserted in (".base_layer.", ".original_module.", ".modules_to_save.default."):
        name = name.replace(inserted, ".")
    return name.removeprefix("base_model.model.")


@dataclass(frozen=True)
class _Place:
    """Where a module holds a parameter; ``name`` is the parameter's name in the unadapted model."""

    name: str
    module: nn.Module
    attribute: str


def _on_meta(model: nn.Module) -> list[tuple[nn.Parameter, list[_Place]]]:
    """Every parameter without memory, once, with all its places: tied embeddings have two."""
    found: dict[int, tuple[nn.Parameter, list[_Place]]] = {}
    for module_name, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                place = _Place(plain_name(f"{module_name}.{attribute}"), module, attribute)
                found.setdefault(id(parameter), (parameter, []))[1].append(place)
    return list(found.values())
