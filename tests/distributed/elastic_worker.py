"""One rank of the elastic test: a leg of every journey that has one on so many ranks.

Usage: deepspeed elastic_worker.py first|then|gate MODELS OUTPUT_FOLDER
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from comol_ds.parallel import groups
from tests.distributed.elastic_cases import GATE, JOURNEYS, train_leg


def main() -> None:
    leg, models, output = sys.argv[-3:]
    world = groups.read_world()
    groups.initialize(world, timeout_minutes=2)
    legs = [(GATE, "first"), (GATE, "then")] if leg == "gate" else [(journey, leg) for journey in JOURNEYS]
    # DeepSpeed keeps the process groups that it was given once: without tensor parallelism first
    for journey, name in sorted(legs, key=lambda leg: getattr(*leg).tensor_parallel):
        layout, folder = getattr(journey, name), Path(output) / journey.name
        if layout.ranks == world.size:
            outcome = train_leg(journey, layout, models, folder)
            if world.rank == 0:
                torch.save(outcome, folder / f"{name}.pt")
    groups.shut_down()


if __name__ == "__main__":
    main()
    groups.exit_process(0)
