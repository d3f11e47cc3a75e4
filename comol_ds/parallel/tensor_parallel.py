"""Applies tensor parallelism to an adapted model from outside; the model's own code is untouched.

The model stands on the meta device, with adapters declared whole. In this order:
    1. embedding and output head are split over the vocabulary;
    2. every Linear of the plan becomes column- or row-parallel, with the hooks and seams that its adapter needs;
    3. adapters are drawn whole, and each rank keeps its slices (the adapter's table says which).
Attention needs nothing more: the supported models read the number of heads off the projections' output.
"""

from collections import defaultdict

import torch
from peft import PeftModel
from torch import nn

from comol_ds.adapters.comol_layer import ADAPTER, CoMoLLinear
from comol_ds.adapters.table import AdapterParameter, BaseKind
from comol_ds.parallel.mesh import Mesh
from comol_ds.parallel.tp_layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    RowPartialSums,
    ShardedInputDropout,
    SharedInput,
)
from comol_ds.parallel.vocabulary import Vocabulary, VocabularyLookup


def parallelize(model: PeftModel, placement: dict[str, BaseKind], mesh: Mesh, device: torch.device) -> Vocabulary:
    """Replace the sharded layers and draw this rank's slices of the adapter.

    Args:
        model: adapted, on the meta device; changed in place.
        placement: name of a Linear in the base model -> "column" or "row".
        mesh: the ranks.
        device: where the adapter's parameters go; the base stays on meta, with local shapes.

    Returns:
        How the logits are spread.
    """
    base = model.get_base_model()
    vocabulary = shard_base(base, placement, mesh)
    draw_adapters(base, mesh, device)
    return vocabulary


def shard_base(base: nn.Module, placement: dict[str, BaseKind], mesh: Mesh) -> Vocabulary:
    """Replace the sharded layers, inside their adapters where they have one; arguments and answer as of `parallelize`.

    The new parameters remember their shards and have no values yet.
    """
    vocabulary = _shard_vocabulary(base, mesh)
    _shard_linears(base, placement, mesh)
    return vocabulary


def _shard_vocabulary(base: nn.Module, mesh: Mesh) -> Vocabulary:
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    tied = head.weight is embedding.weight
    vocabulary = Vocabulary(mesh, embedding.num_embeddings)
    VocabularyLookup(embedding, mesh)
    name = next(name for name, module in base.named_modules() if module is head)
    _replace_linear(base, name, ColumnParallelLinear, mesh)
    outer = base.get_submodule(name)  # an adapter around the head, or the head
    if tied:
        _base_of(outer).weight = embedding.weight
    outer.register_forward_pre_hook(SharedInput(1, mesh))
    outer.register_forward_hook(vocabulary.after_head)
    return vocabulary


def _shard_linears(base: nn.Module, placement: dict[str, BaseKind], mesh: Mesh) -> None:
    siblings = defaultdict(list)
    for name, kind in placement.items():
        _replace_linear(base, name, {"column": ColumnParallelLinear, "row": RowParallelLinear}[kind], mesh)
        outer = base.get_submodule(name)
        if kind == "column":
            siblings[name.rpartition(".")[0]].append(outer)
        elif isinstance(outer, CoMoLLinear):
            outer.partial_sums = RowPartialSums(outer.base_layer)
            outer.input_dropout = ShardedInputDropout(mesh.grid)
    for readers in siblings.values():
        shared = SharedInput(len(readers), mesh)
        for reader in readers:
            reader.register_forward_pre_hook(shared)


def _replace_linear(base: nn.Module, name: str, kind: type[nn.Linear], mesh: Mesh) -> None:
    """Put the sharded layer where the whole one was, inside its adapter if it has one."""
    outer = base.get_submodule(name)
    if isinstance(outer, CoMoLLinear):
        outer.base_layer = kind(outer.base_layer, mesh)
    else:
        base.set_submodule(name, kind(outer, mesh))


def _base_of(layer: nn.Module) -> nn.Linear:
    return layer.base_layer if isinstance(layer, CoMoLLinear) else layer


def draw_adapters(base: nn.Module, mesh: Mesh, device: torch.device) -> None:
    """Give declared adapters their initial values, in module order: whole beside a Linear that is not sharded."""
    for layer in base.modules():
        if isinstance(layer, CoMoLLinear):
            _draw_adapter(layer, mesh, device)


def _draw_adapter(layer: CoMoLLinear, mesh: Mesh, device: torch.device) -> None:
    """Draw one layer's adapter, and write on each parameter what the rest of the program must know about it."""
    kind, table = base_kind(layer), layer.tables[ADAPTER]
    whole_shapes = {row.name: getattr(layer, row.name)[ADAPTER].shape for row in table}
    dims = {row.name: row.sharded_dim(kind) if kind else None for row in table}
    shards = {name: mesh.shard(whole_shapes[name][dim], dim) for name, dim in dims.items() if dim is not None}

    def keep(row: AdapterParameter, whole: torch.Tensor) -> torch.Tensor:
        shard = shards.get(row.name)
        return whole if shard is None else shard.part_of(whole).clone()

    layer.draw_parameters(ADAPTER, device, keep)
    for name, whole_shape in whole_shapes.items():
        parameter = getattr(layer, name)[ADAPTER]
        if name in shards:
            parameter.shard, parameter.whole_shape = shards[name], whole_shape
            # DeepSpeed's mark: counted on every tensor-parallel rank in the gradient norm, others on rank 0 only
            parameter.tensor_model_parallel = True
        elif kind == "column":
            parameter.gradient_is_partial = True


def base_kind(layer: CoMoLLinear) -> BaseKind | None:
    """How the Linear inside is sharded; None where every rank holds all of it."""
    kinds = {ColumnParallelLinear: "column", RowParallelLinear: "row"}
    return kinds.get(type(layer.base_layer))
