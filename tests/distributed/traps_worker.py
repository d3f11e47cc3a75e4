"""One rank of the trap tests: trains one case again and again, each time with another thing broken on purpose.

Usage: deepspeed traps_worker.py MODELS OUTPUT_FOLDER
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
from deepspeed.utils import groups as deepspeed_groups
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from comol_ds.adapters.comol_layer import CoMoLLinear
from comol_ds.adapters.routing import PartialSums, Routed
from comol_ds.parallel import assemble as assembling
from comol_ds.parallel import groups, tp_layers
from comol_ds.parallel.collectives import sum_over_tensor_parallel
from comol_ds.parallel.gradients import Gradients
from comol_ds.parallel.mesh import Mesh
from comol_ds.parallel.tensor_parallel import ADAPTER, base_kind
from tests.distributed import case_runner, equality_cases
from tests.distributed.equality_cases import Case

# The learning rate is 0 in the first step, and B is 0 until the second step has changed it: A, cores and router have no
# gradient before the third. SGD shows a wrong scale that AdamW would divide away.
CASE = Case("zero3", 1, "sgd", "none", tensor_parallel=2, r=5, steps=4)


def without_attribute() -> AbstractContextManager:
    """Sharded trainable parameters do not carry DeepSpeed's mark `tensor_model_parallel`."""

    def unmark(model: nn.Module, mesh: Mesh) -> None:
        for parameter in model.parameters():
            if hasattr(parameter, "tensor_model_parallel"):
                del parameter.tensor_model_parallel

    return _after_parallelize(unmark)


def partitioned_over_world() -> AbstractContextManager:
    """zero.Init is not told the data-parallel group and partitions over the whole world.

    It still gets the mpu: without it, DeepSpeed 0.19 counts 4 data-parallel ranks and refuses the batch sizes.
    """

    def over_world(original: Callable, *args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs | {"data_parallel_group": None})

    return _around(deepspeed.zero, "Init", over_world)


@contextmanager
def with_hpz() -> Iterator[None]:
    """ZeRO++'s secondary partitions, which DeepSpeed builds over consecutive ranks: over tensor-parallel peers."""

    def add_hpz(original: Callable, *args: Any) -> dict[str, Any]:
        resolved = original(*args)
        return resolved | {"zero_optimization": resolved["zero_optimization"] | {"zero_hpz_partition_size": 2}}

    # DeepSpeed keeps the group in a global that would outlive this trap
    group_of_this_trap = patch.object(deepspeed_groups, "_ZERO_PARAM_INTRA_PARALLEL_GROUP", None)
    with _around(case_runner, "resolve_ds_config", add_hpz), group_of_this_trap:
        yield


def routed_on_partial_sums() -> AbstractContextManager:
    """Row-parallel: h is never summed; every rank routes and mixes its own part of it."""

    class SumOfBaseOnly(tp_layers.RowPartialSums):
        def forward(self, y: torch.Tensor, routed: list[Routed]) -> tuple[torch.Tensor, list[Routed]]:
            return super().forward(y, [])[0], routed

    def replace(model: nn.Module, mesh: Mesh) -> None:
        for layer in _row_parallel(model):
            layer.partial_sums = SumOfBaseOnly(layer.base_layer)

    return _after_parallelize(replace)


def summed_after_routing() -> AbstractContextManager:
    """Row-parallel: the sum comes behind the adapter, as plain LoRA allows; softmax of a part is no part of softmax.

    The gradients of what follows h are declared partial, which makes all else right: with one expert, whose gate is 1
    on every rank, the same sum equals one process to 6e-7.
    """

    def postpone(model: nn.Module, mesh: Mesh) -> None:
        for layer in _row_parallel(model):
            layer.partial_sums = PartialSums()
            layer.register_forward_hook(lambda _, __, y: sum_over_tensor_parallel(y.clone(), mesh.tensor_group))
            for name in ("comol_B", "comol_cores", "comol_router"):
                getattr(layer, name)[ADAPTER].gradient_is_partial = True

    return _after_parallelize(postpone)


def partial_gradients_left() -> AbstractContextManager:
    """Nobody adds up the gradients of the replicated A, cores and router over the tensor-parallel ranks."""
    return patch.object(Gradients, "_sum_partial", lambda self: None)


def input_gradient_left() -> AbstractContextManager:
    """Backward of a column-parallel layer's input keeps this rank's part."""
    return patch.object(tp_layers, "copy_to_tensor_parallel", lambda x, group: x)


def drawn_per_shard() -> AbstractContextManager:
    """Every rank draws its slices themselves from the seed, instead of slicing what was drawn whole."""

    def draw_slices(original: Callable, self: CoMoLLinear, adapter: str, device: torch.device, *keep: Callable) -> None:
        original(self, adapter, device, *keep)
        if device.type != "meta":
            for row in self.tables[adapter]:
                row.initialize(getattr(self, row.name)[adapter].data)

    return _around(CoMoLLinear, "draw_parameters", draw_slices)


def other_batches_for_peers() -> AbstractContextManager:
    """One tensor-parallel rank of each group reads other records, of the same lengths, so that no shape tells."""

    def other_records(original: Callable, *args: Any, **kwargs: Any) -> dict[str, Any]:
        batch = original(*args, **kwargs)
        if groups.mesh().grid.tp_rank == 0:
            return batch
        ids = (3 + batch["input_ids"] % 300) * batch["attention_mask"]
        return batch | {"input_ids": ids, "labels": torch.where(batch["labels"] == -100, -100, ids)}

    return _around(equality_cases, "random_batch", other_records)


def nothing_broken() -> AbstractContextManager:
    """The control. It is trained last, so that it also tells whether every trap was undone."""
    return nullcontext()


TRAPS = [
    without_attribute,
    partitioned_over_world,
    with_hpz,
    routed_on_partial_sums,
    summed_after_routing,
    partial_gradients_left,
    input_gradient_left,
    drawn_per_shard,
    other_batches_for_peers,
]


def _around(owner: Any, name: str, change: Callable) -> AbstractContextManager:
    """Replace ``owner.name`` by a function that calls ``change`` with the original in front of the arguments."""
    original = getattr(owner, name)
    return patch.object(owner, name, lambda *args, **kwargs: change(original, *args, **kwargs))


def _after_parallelize(change: Callable[[nn.Module, Mesh], None]) -> AbstractContextManager:
    """Change the model between tensor parallelism and the engine."""

    def parallelize(original: Callable, model: nn.Module, placement: dict, mesh: Mesh, device: torch.device) -> Any:
        vocabulary = original(model, placement, mesh, device)
        change(model, mesh)
        return vocabulary

    return _around(assembling, "parallelize", parallelize)


def _row_parallel(model: nn.Module) -> list[CoMoLLinear]:
    return [layer for layer in model.modules() if isinstance(layer, CoMoLLinear) and base_kind(layer) == "row"]


def train_broken(trap: Callable[[], AbstractContextManager], models: str) -> dict:
    with trap():
        return case_runner.train_case(CASE, models)


def main() -> None:
    models, output = sys.argv[-2:]
    traps = [*TRAPS, nothing_broken]
    case_runner.run_worker(
        ((trap.__name__, CASE, partial(train_broken, trap, models)) for trap in traps), output, timeout_minutes=1
    )


if __name__ == "__main__":
    main()
    groups.exit_process(0)
