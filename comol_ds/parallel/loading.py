"""Fills a model that stands on meta with this rank's slices of a checkpoint, partitioned at once under ZeRO-3."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from peft import PeftModel
from torch import nn

from comol_ds.ds_config import zero_stage
from comol_ds.parallel.device import device
from comol_ds.parallel.mesh import Mesh
from comol_ds.parallel.weight_files import WeightFiles


def load_weights(
    model: PeftModel, files: WeightFiles, whole_shapes: Mapping[str, torch.Size], ds_config: dict[str, Any], mesh: Mesh
) -> None:
    """Give every frozen parameter its values, one at a time; a collective call under ZeRO-3.

    Under ZeRO-3 one data-parallel rank reads a slice and the partitioning hands it to the others; at most one whole
    slice per rank exists at any time. Otherwise every rank reads its own.

    Args:
        model: base parameters on meta with this rank's shapes, adapters real.
        files: the checkpoint.
        whole_shapes: name in the base model -> shape of the unsharded parameter.
        ds_config: the resolved DeepSpeed dictionary.
        mesh: the ranks.

    Raises:
        UserError: a tensor is missing, has another shape, or cannot be read.
    """
    partition = ZeroPartitioner(ds_config, mesh) if zero_stage(ds_config) == 3 else None
    reads = partition is None or mesh.grid.dp_rank == 0
    for parameter, places in _on_meta(model):
        name = _stored_name(places, files)
        files.check_shape(name, tuple(whole_shapes[name]))
        shard = getattr(parameter, "shard", None)
        if reads:
            values = files.read(name, shard, parameter.dtype).to(device())
        else:
            values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device())
        assert values.shape == parameter.shape
        loaded = nn.Parameter(values, requires_grad=False)
        for place in places:
            setattr(place.module, place.attribute, loaded)
        if partition is not None:
            partition(loaded, replicated=shard is None)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device())


class ZeroPartitioner:
    """Partitions single parameters as DeepSpeed's zero.Init would, each over the right ranks.

    zero.Init's default is the whole world, which would hand rank 0's slice to all tensor-parallel ranks, silently.
    """

    def __init__(self, ds_config: dict[str, Any], mesh: Mesh) -> None:
        self._ds_config, self._mesh = ds_config, mesh
        self._first: nn.Parameter | None = None

    def __call__(self, parameter: nn.Parameter, replicated: bool) -> None:
        """Partition in place. A replicated matrix is spread over all ranks, for it is the same on all of them.

        Vectors (norms, biases) stay with the data-parallel ranks: gathered together with their layer's slices they
        cost no collective of their own, and they are a ten-thousandth of the weights.
        """
        if replicated and parameter.dim() > 1:
            parameter.ds_zero_partition_process_group = dist.group.WORLD
        if self._first is not None:
            self._first.convert_to_zero_parameters([parameter])
            return
        holder = nn.Module()
        holder.register_parameter("parameter", parameter)
        deepspeed.zero.Init(
            module=holder,
            config_dict_or_path=self._ds_config,
            data_parallel_group=self._mesh.data_group,
            mpu=self._mesh,
        )
        self._first = parameter


def plain_name(name: str) -> str:
    """The name in the unadapted model of a parameter of the adapted one."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


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


def _stored_name(places: list[_Place], files: WeightFiles) -> str:
    """The name under which the checkpoint has the parameter: of tied ones it need not have all."""
    names = [place.name for place in places]
    return files.find(next((name for name in names if name in files), names[0]))
