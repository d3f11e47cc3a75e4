"""One rank of the ZeRO-3 structure test: what is partitioned, and which collectives building and a step make.

Usage: deepspeed zero3_worker.py MODELS OUTPUT_FOLDER
"""

import json
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from comol_ds.benchmark.recorded_calls import CALLS, COLLECTIVES, record_collectives

record_collectives()

from comol_ds.adapters.shared_down import SharedDown
from comol_ds.parallel import groups
from comol_ds.parallel.assemble import assemble, build_model
from comol_ds.training.router_load import RouterLoad
from tests.distributed.case_runner import resolve_case, run_steps
from tests.distributed.equality_cases import Case


@contextmanager
def counted():
    """Yields a dictionary that holds the calls made inside by collective, once the block has ended."""
    start, inside = len(CALLS), dict.fromkeys(COLLECTIVES, 0)
    yield inside
    for call in CALLS[start:]:
        inside[call.name] += 1


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
        with counted() as calls, patch.object(SharedDown, "_read", autospec=True, side_effect=SharedDown._read) as read:
            run_steps(assembled, case, RouterLoad(assembled.engine.module), range(step, step + 1))
        steps.append(calls | {"shared_reads": read.call_count})
    if world.rank == 0:
        report = {"held_after_build": shares, "building": building, "steps": steps}
        (Path(output) / "report.json").write_text(json.dumps(report))
    groups.shut_down()


if __name__ == "__main__":
    main()
    groups.exit_process(0)
