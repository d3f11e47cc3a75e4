"""One rank of the collectives benchmark: counts what one training step of every contender sends.

Usage: deepspeed --module comol_ds.benchmark.collectives_rank FOLDER
FOLDER holds job.json, {case, tensor_parallel, contenders}, and the model; rank 0 writes calls.json.
"""

import json
import sys
from pathlib import Path

from comol_ds.benchmark.recorded_calls import CALLS, record_collectives

STEPS_BEFORE = 2  # ZeRO-3 learns the order of the modules in the first


def main() -> None:
    record_collectives()  # before DeepSpeed is imported
    from comol_ds.benchmark.whole_models import ModelCase, Trained
    from comol_ds.parallel import groups

    folder = Path(sys.argv[-1])
    job = json.loads((folder / "job.json").read_text())
    world = groups.read_world()
    groups.quiet_libraries()
    groups.initialize(world, timeout_minutes=10, tensor_parallel=job["tensor_parallel"])
    calls = {}
    for name in job["contenders"]:
        contender = Trained(ModelCase(**job["case"]), name, folder, keep_gathered=False)
        for _ in range(STEPS_BEFORE):
            contender.step()
        start = len(CALLS)
        contender.step()
        tensor_group = groups.mesh().tensor_group
        calls[name] = [
            {
                "collective": call.name,
                "tensor_parallel": tensor_group is not None and call.group is tensor_group,
                "bytes": call.nbytes,
            }
            for call in CALLS[start:]
        ]
    if world.rank == 0:
        (folder / "calls.json").write_text(json.dumps(calls))
    groups.shut_down()
    groups.exit_process(0)


if __name__ == "__main__":
    main()
