"""One rank of an equality test: trains every case of a suite in turn and saves what rank 0 sees.

Usage: deepspeed equality_worker.py SUITE MODELS OUTPUT_FOLDER
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from comol_ds.parallel import groups
from tests.distributed.case_runner import train_case
from tests.distributed.equality_cases import SUITES


def main() -> None:
    suite, models, output = sys.argv[-3:]
    world = groups.read_world()
    groups.initialize(world, timeout_minutes=2)
    for case in SUITES[suite]:
        groups.arrange(case.tensor_parallel)
        outcome = train_case(case, models)
        if world.rank == 0:
            torch.save(outcome, Path(output) / f"{case.name}.pt")
    groups.shut_down()


if __name__ == "__main__":
    main()
    groups.exit_process(0)
