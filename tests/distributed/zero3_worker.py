"""One rank of the ZeRO-3 structure test: what is partitioned, and which collectives building and a step make.

Usage: deepspeed zero3_worker.py MODELS OUTPUT_FOLDER
"""

import json
import sys
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch.distributed as dist

CALLS = dict.fromkeys(("all_gather_into_tensor", "broadcast", "reduce_scatter_tensor", "all_reduce"), 0)


def count_calls(name: str) -> None:
    """Replace one of torch's collectives by itself plus a count."""
    original = getattr(dist, name)

    def call(*args, **kwargs):
        CALLS[name] += 1
        return original(*args, **kwargs)

    setattr(dist, name, call)


for collective in CALLS:  # before DeepSpeed is imported: it keeps its own references
    count_calls(collective)

from comol_ds.parallel import groups
from comol_ds.parallel.assemble import assemble, build_model
from comol_ds.training.router_load import RouterLoad
from tests.distributed.case_runner import resolve_case, run_steps
from tests.distributed.equality_cases import Case


@contextmanager
def counted():
    """Yields a dictionary that holds the calls made inside, once the block has ended."""
    before, inside = dict(CALLS), {}
    yield inside
    inside.update({name: CALLS[name] - before[name] for name in CALLS})


def main() -> None:
    models, output = sys.argv[-2:]
    world = groups.read_world()
    groups.initialize(world, timeout_minutes=2)
    case = Case("zero3", 1, "adamw_torch", "none")
    config, ds_config = resolve_case(case, models)

    with counted() as building:
        model, _ = build_model(config, config.model.model_name_or_path, ds_config, False, groups.mesh())
    frozen = [p for p in model.parameters() if not p.requires_grad]
    shares = [(p.numel(), p.ds_tensor.numel() * world.size - p.ds_numel) for p in frozen]
    del model, frozen

    # a model of real size does not stay gathered between forward and backward; make this one behave so
    keep_nothing = ("stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size")
    ds_config["zero_optimization"] |= dict.fromkeys(keep_nothing, 0)
    assembled = assemble(config, config.model.model_name_or_path, ds_config, case.steps, bf16=False)
    assembled.engine.train()
    steps = []
    for step in range(3):
        with counted() as calls:
            run_steps(assembled, case, RouterLoad(assembled.engine.module), range(step, step + 1))
        steps.append(calls)
    if world.rank == 0:
        report = {"held_after_build": shares, "building": building, "steps": steps}
        (Path(output) / "report.json").write_text(json.dumps(report))
    groups.shut_down()


if __name__ == "__main__":
    main()
    groups.exit_process(0)
