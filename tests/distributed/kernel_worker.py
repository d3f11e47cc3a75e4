"""One rank of an equality test that counts how often Triton's kernels mixed; COMOL_KERNEL is its environment's.

Usage: deepspeed kernel_worker.py SUITE MODELS OUTPUT_FOLDER
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from comol_ds.adapters import mixing_triton
from comol_ds.parallel import groups
from tests.distributed.case_runner import train_case
from tests.distributed.equality_cases import SUITES

PASSES = ("forward", "backward")
CALLS = dict.fromkeys(PASSES, 0)


def count(name: str) -> None:
    kernel = getattr(mixing_triton, name)

    def counted(*args):
        CALLS[name] += 1
        return kernel(*args)

    setattr(mixing_triton, name, counted)


def main() -> None:
    suite, models, output = sys.argv[-3:]
    for name in PASSES:
        count(name)
    world = groups.read_world()
    groups.initialize(world, timeout_minutes=2)
    for case in SUITES[suite]:
        groups.arrange(case.tensor_parallel)
        CALLS.update(dict.fromkeys(PASSES, 0))
        outcome = train_case(case, models)
        outcome["kernels"] = groups.gather_objects(dict(CALLS), "count the kernels")
        if world.rank == 0:
            torch.save(outcome, Path(output) / f"{case.name}.pt")
    groups.shut_down()


if __name__ == "__main__":
    main()
    groups.exit_process(0)
