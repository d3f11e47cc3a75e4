"""One rank that counts what really is held, saved and communicated, in every layout of the planner's test.

Usage: deepspeed plan_worker.py SUITE MODEL OUTPUT_FOLDER
"""

import gc
import json
import sys
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from comol_ds.benchmark.recorded_calls import CALLS, record_collectives

SMALLEST = 256  # bytes; below are norms and counts
PLAIN_LINEAR = torch.nn.functional.linear  # the first ZeRO-3 engine replaces it for good

record_collectives()

from comol_ds.ds_config import resolve_ds_config
from comol_ds.layout import plan_batches
from comol_ds.parallel import groups
from comol_ds.parallel.assemble import Assembled, assemble
from comol_ds.parallel.device import device
from comol_ds.planner.counting import LiveBytes
from comol_ds.training.router_load import RouterLoad
from comol_ds.training.step import batch_loss, train_step
from tests.planner.layouts import SUITES, Layout, batch


def stored(tensors: Iterable[torch.Tensor], but: Iterable[torch.Tensor] = ()) -> int:
    """Bytes of the storages behind tensors, each once, without those behind others."""
    excluded = {tensor.untyped_storage().data_ptr() for tensor in but}
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(nbytes for pointer, nbytes in found.items() if pointer not in excluded)


def weights(engine: Any, trainable: bool) -> list[torch.Tensor]:
    """What this rank holds of the parameters: ZeRO-3's partition, else the parameter."""
    parameters = [p for p in engine.module.parameters() if p.requires_grad == trainable]
    return [getattr(p, "ds_tensor", p.data) for p in parameters]


def optimizer_state(engine: Any) -> int:
    """fp32 master copies and moments; a partition that is its own master copy is a weight."""
    zero = engine.optimizer
    inner = getattr(zero, "optimizer", zero)
    names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups")  # stage 3; 1 and 2
    masters = [tensor for name in names for tensor in getattr(zero, name, [])]
    moments = [value for state in inner.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    return stored([*masters, *moments], but=weights(engine, True))


@contextmanager
def saved_for_backward(module: torch.nn.Module):
    """Yields a dictionary whose values, once the block has ended, are the bytes of what autograd saved."""
    parameters, held, sizes = list(module.parameters()), [], {}
    buffers = {buffer.untyped_storage().data_ptr() for buffer in module.buffers()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        own = {p.untyped_storage().data_ptr() for p in parameters if p.numel()}  # ZeRO-3 gathers them anew each time
        if not isinstance(tensor, torch.nn.Parameter) and pointer not in own | buffers:
            held.append(tensor)  # a freed storage's address may be given to another
            sizes[pointer] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes
    held.clear()


def saved_bytes(assembled: Assembled, layout: Layout, load: RouterLoad) -> int:
    """By the forward pass through the engine, and the loss."""
    with saved_for_backward(assembled.engine.module) as sizes:
        loss = batch_loss(assembled, batch(layout.rows), load, device())
    assembled.engine.backward(loss)
    return sum(sizes.values())


def highest_bytes(assembled: Assembled, layout: Layout, load: RouterLoad) -> int:
    """Of the memory that a forward and a backward pass take beside what exists before them."""
    before = [value for value in gc.get_objects() if isinstance(value, torch.Tensor)]
    with LiveBytes(before) as live:
        loss = batch_loss(assembled, batch(layout.rows), load, device())
        assembled.engine.backward(loss)
    return live.highest


def collectives(layout: Layout) -> dict[str, list[int]]:
    """What was recorded, by kind: bytes of each."""
    group = groups.mesh().tensor_group
    found = {"gather": [], "scatter": [], "reduce": [], "tensor": []}
    kinds = {"all_gather_into_tensor": "gather", "reduce_scatter_tensor": "scatter", "all_reduce": "reduce"}
    for call in CALLS:
        if call.name in kinds and call.nbytes >= SMALLEST:
            kind = "tensor" if group is not None and call.group is group else kinds[call.name]
            found[kind].append(call.nbytes)
    return found


def measure(layout: Layout, model: str) -> dict[str, Any]:
    config = layout.run_config(model)
    batches = plan_batches(groups.mesh().grid.data_parallel, layout.rows, layout.global_batch)
    ds_config = resolve_ds_config(layout.template(), config, batches, layout.bf16)
    torch.nn.functional.linear = PLAIN_LINEAR
    assembled = assemble(config, model, ds_config, total_steps=3, bf16=layout.bf16)
    engine = assembled.engine
    engine.train()
    load = RouterLoad(engine.module)
    for step in range(3 if layout.ds_config.startswith("zero3") else 1):  # ZeRO-3 prefetches from the third on
        CALLS.clear()
        train_step(assembled, [batch(layout.rows) for _ in range(layout.accumulation)], load, device(), step + 1)
    found = {
        "collectives": collectives(layout),
        "frozen": stored(weights(engine, False)),
        "adapter": stored(weights(engine, True)),
        "optimizer": optimizer_state(engine),
        "saved": saved_bytes(assembled, layout, load),
        "highest": highest_bytes(assembled, layout, load),
    }
    engine.destroy()
    return found


def main() -> None:
    suite, model, output = sys.argv[-3:]
    world = groups.read_world()
    groups.initialize(world, timeout_minutes=2)
    report = {}
    for layout in SUITES[suite]:
        groups.arrange(layout.tensor_parallel)
        report[layout.name] = measure(layout, model)
    if world.rank == 0:
        (Path(output) / f"{suite}.json").write_text(json.dumps(report))
    groups.shut_down()


if __name__ == "__main__":
    main()
    groups.exit_process(0)
