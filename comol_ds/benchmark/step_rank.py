"""One rank of the step benchmark: all contenders' engines side by side, which take turns.

Usage: deepspeed --module comol_ds.benchmark.step_rank FOLDER
FOLDER holds job.json, {case, tensor_parallel, contenders, rounds, warmup}, and the model; rank 0 writes seconds.json.
"""

import json
import sys
import time
from pathlib import Path

import torch

from comol_ds.benchmark.figures import in_turns
from comol_ds.benchmark.whole_models import ModelCase, Trained
from comol_ds.parallel import groups
from comol_ds.parallel.device import peak_memory_bytes


def main() -> None:
    folder = Path(sys.argv[-1])
    job = json.loads((folder / "job.json").read_text())
    world = groups.read_world()
    groups.quiet_libraries()
    groups.initialize(world, timeout_minutes=10, tensor_parallel=job["tensor_parallel"])
    case = ModelCase(**job["case"])
    contenders = {name: Trained(case, name, folder) for name in job["contenders"]}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for name, counts in in_turns(list(contenders), job["rounds"], job["warmup"]):
        taken = _timed(contenders[name])
        if counts:
            seconds[name].append(taken)
    if world.rank == 0:
        report = {"seconds": seconds, "threads": torch.get_num_threads(), "peak_bytes": peak_memory_bytes()}
        (folder / "seconds.json").write_text(json.dumps(report))
    groups.shut_down()


def _timed(contender: Trained) -> float:
    """Seconds until the last rank is done."""
    groups.barrier("start of a step")
    start = time.perf_counter()
    contender.step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    groups.barrier("end of a step")
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
    groups.exit_process(0)
