"""One rank of the tensor-parallel structure test (TP2 x DP2): its collectives, and what stays alive between the passes.

Usage: deepspeed tp_structure_worker.py MODELS OUTPUT_FOLDER
"""

import dataclasses
import json
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

from comol_ds.benchmark.recorded_calls import CALLS, record_collectives

record_collectives()

from comol_ds.config import RouterSettings
from comol_ds.parallel import groups
from comol_ds.parallel.assemble import Assembled, assemble
from comol_ds.parallel.tp_layers import ColumnParallelLinear
from comol_ds.training.router_load import RouterLoad
from tests.distributed.case_runner import build_case, resolve_case, run_steps
from tests.distributed.equality_cases import ROUTER_LOSSES, TASKS, variation
from tests.tiny_models import random_batch
from tests.token_losses import token_losses

ROWS = 2


@contextmanager
def tensor_parallel_calls():
    """Yields a list that holds the sizes of the tensor-parallel all-reduces made inside, once the block has ended."""
    start, inside = len(CALLS), []
    yield inside
    group = groups.mesh().tensor_group
    inside.extend(call.numel for call in CALLS[start:] if call.name == "all_reduce" and call.group is group)


def passes(assembled: Assembled) -> dict[str, list[int]]:
    """The all-reduces of one forward and one backward pass of the module, without the engine."""
    batch = random_batch(ROWS, seed=0)
    with tensor_parallel_calls() as forward:
        logits = assembled.engine.module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    with tensor_parallel_calls() as loss_calls:
        loss = token_losses(logits, batch["labels"], assembled.vocabulary).sum()
    with tensor_parallel_calls() as backward:
        loss.backward()
    return {"forward": forward, "loss": loss_calls, "backward": backward, "logits": list(logits.shape)}


def count(models: str) -> dict:
    """At stage 0, where the tensor-parallel collectives are all that the passes make."""
    assembled = build_case(variation(ds_config="zero0", checkpointing="none"), models)
    module = assembled.engine.module
    module.get_base_model().enable_input_require_grads()  # the base alone must have something to pass gradients to
    adapted = passes(assembled)
    module.zero_grad()
    with module.disable_adapter():
        frozen = passes(assembled)
    numel = sum(p.numel() for p in module.parameters() if getattr(p, "gradient_is_partial", False))
    case = variation(ds_config="zero0", accumulation=3)
    assembled = build_case(case, models)
    with tensor_parallel_calls() as step:
        run_steps(assembled, case, RouterLoad(assembled.engine.module), range(1))
    return {"adapted": adapted, "frozen": frozen, "partial": numel, "step": step}


def saved_views(engine) -> list[str]:
    """Names of the gathered weights of which a forward pass saves a view: it would keep the gathered buffer alive."""
    weights = {id(p): (name, p) for name, p in engine.module.named_parameters()}
    found = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in weights and tensor.numel():
            pointer = tensor.untyped_storage().data_ptr()
            found.extend(
                name for name, p in weights.values() if p.numel() and p.untyped_storage().data_ptr() == pointer
            )
        return tensor

    batch = random_batch(ROWS, seed=1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        engine(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    return found


def zero3(models: str) -> dict:
    """What ZeRO-3 gathers per step, what it holds, and what stays alive after the forward pass."""
    case = variation(ds_config="zero3")
    config, ds_config = resolve_case(case, models)
    # a model of real size does not stay gathered between forward and backward; make this one behave so
    keep_nothing = ("stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size")
    ds_config["zero_optimization"] |= dict.fromkeys(keep_nothing, 0)
    assembled = assemble(config, config.model.model_name_or_path, ds_config, case.steps, bf16=False)
    assembled.engine.train()
    load = RouterLoad(assembled.engine.module)
    run_steps(assembled, case, load, range(1))
    start = len(CALLS)
    run_steps(assembled, case, load, range(1, 2))
    gathers = sum(call.name == "all_gather_into_tensor" for call in CALLS[start:])
    views = saved_views(assembled.engine)
    with patch.object(ColumnParallelLinear, "forward", lambda self, x: x @ self.weight.transpose(0, 1)):
        planted = saved_views(assembled.engine)
    return {"gathers": gathers, "views": views, "planted": planted}


def router_statistics(models: str, losses: tuple[str, ...]) -> dict[str, list[tuple[str, int]]]:
    """The collectives of a step, always on the same batch, with ever more asked of the routers; and of reading them."""
    case = variation(accumulation=3, checkpointing="full", steps=2, router_losses=losses)
    assembled = build_case(case, models)
    load = RouterLoad(assembled.engine.module, tasks=TASKS)
    silent = RouterLoad(assembled.engine.module, RouterSettings(router_load=False))
    run_steps(assembled, case, silent, range(1))
    # the last step of a case is counted with detail
    plain = dataclasses.replace(case, steps=9)
    calls = {}
    for what, counts, as_case in (("off", silent, plain), ("on", load, plain), ("detail", load, case)):
        start = len(CALLS)
        run_steps(assembled, as_case, counts, range(1, 2))
        calls[what] = [(call.name, call.numel) for call in CALLS[start:]]
    start = len(CALLS)
    load.pop()
    return calls | {"pop": [(call.name, call.numel) for call in CALLS[start:]]}


def partition_groups(models: str) -> dict[str, int]:
    """Number of ranks that share each frozen weight of the first layer, with a plan that leaves its MLP whole."""
    assembled = build_case(variation(ds_config="zero3", tp_plan="attention_only.json"), models)
    named = assembled.engine.module.get_base_model().model.layers[0].named_parameters()
    return {name: dist.get_world_size(p.ds_process_group) for name, p in named if not p.requires_grad}


def main() -> None:
    models, output = sys.argv[-2:]
    world = groups.read_world()
    groups.initialize(world, timeout_minutes=2, tensor_parallel=2)
    report = {
        "count": count(models),
        "zero3": zero3(models),
        "groups": partition_groups(models),
        "routers": {"plain": router_statistics(models, ()), "losses": router_statistics(models, tuple(ROUTER_LOSSES))},
    }
    if world.rank == 0:
        (Path(output) / "report.json").write_text(json.dumps(report))
    groups.shut_down()


if __name__ == "__main__":
    main()
    groups.exit_process(0)
