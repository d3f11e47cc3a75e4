"""One rank of the equality test: trains every case in turn and saves what rank 0 sees.

Usage: deepspeed equality_worker.py MODELS OUTPUT_FOLDER
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from comol_ds.parallel import groups
from comol_ds.parallel.zero_partition import gather_adapter
from comol_ds.training.router_load import RouterLoad
from tests.distributed.case_runner import build_case, run_steps
from tests.distributed.equality_cases import BF16_CASES, CASES, STEPS, Case


def train(case: Case, models: str, world: groups.World) -> dict:
    assembled = build_case(case, models, world)
    load = RouterLoad(assembled.engine.module)
    results = run_steps(assembled.engine, case, world, load, range(STEPS))
    outcome = {
        "losses": [result.loss_sum / result.targets for result in results],
        "norms": [result.grad_norm for result in results],
        "load": load.pop(),
        "weights": gather_adapter(assembled.engine),
    }
    assembled.engine.destroy()
    return outcome


def main() -> None:
    models, output = sys.argv[-2:]
    world = groups.read_world()
    groups.initialize(world, timeout_minutes=2)
    for case in CASES + BF16_CASES:
        outcome = train(case, models, world)
        if world.rank == 0:
            torch.save(outcome, Path(output) / f"{case.name}.pt")
    groups.shut_down()


if __name__ == "__main__":
    main()
    groups.exit_process(0)
