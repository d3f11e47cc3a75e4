"""One rank of the control-message test. Prints what it learnt; rank 1 misbehaves."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from comol_ds.errors import UserError
from comol_ds.parallel import groups


def fail_on_rank_1(error: Exception) -> None:
    if world.rank == 1:
        raise error


world = groups.read_world()
groups.initialize(world, timeout_minutes=0.15)
print(f"rank {world.rank} gathered {groups.gather_objects(world.rank * 10, 'numbers')}", flush=True)
print(f"rank {world.rank} counted {groups.gather_objects(2**40 + world.rank, 'bytes')}", flush=True)
for error in (UserError("bad row 7"), OSError("disk full")):
    try:
        groups.together("prepare", lambda error=error: fail_on_rank_1(error))
    except Exception as caught:
        print(f"rank {world.rank} caught {type(caught).__name__}: {caught}", flush=True)
order = []
groups.first_on_each_node(world, "cache", lambda: order.append(time.monotonic()))
print(f"rank {world.rank} order {groups.gather_objects(order[0], 'times')}", flush=True)
if world.rank == 0:
    try:
        groups.barrier("the end")
    except RuntimeError as caught:
        print(f"rank 0 missed: {' '.join(str(caught).split())}", flush=True)
else:
    time.sleep(14)  # does not come to the barrier within its 9 s
