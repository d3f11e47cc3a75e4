"""Fine-tune a causal language model with CoMoL adapters: deepspeed launch/train.py --ds_config ds_configs/zero3.json

Starts equally under deepspeed, torchrun, srun python and plain python. Exit codes: 0 done, 2 bad configuration or
input, 75 asked to stop and saved (`comol_ds.training.preemption`), anything else a crash.
"""

import sys
import time

from comol_ds import demo
from comol_ds.config_parser import parse_run_config
from comol_ds.errors import UserError
from comol_ds.parallel.groups import World, exit_process, read_world
from comol_ds.terminal import never_ask

EXIT_BAD_INPUT = 2
EXIT_START_AGAIN = 75  # EX_TEMPFAIL of sysexits.h


def main(argv: list[str]) -> int:
    world = None
    try:
        world = read_world()
        config = parse_run_config(argv)
        config = parse_run_config(argv, demo.defaults_for(config))
        from comol_ds.training.loop import run  # seconds, which a wrong flag and --help need not wait for

        return 0 if run(config, world) else EXIT_START_AGAIN
    except UserError as error:
        tell(error, world)
        return EXIT_BAD_INPUT


def tell(error: UserError, world: World | None) -> None:
    """One line on stderr, from rank 0."""
    where = ""
    if world is not None and world.rank != 0:
        # A launcher that sees this rank exit ends rank 0, maybe before it has spoken. If the job still runs afterwards,
        # rank 0 had nothing to say: the trouble is this node's own, such as a file that only the other nodes have.
        time.sleep(10)
        if world.local_rank != 0:
            return
        where = f"rank {world.rank}: "
    print(f"train.py: error: {where}{error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    never_ask()
    exit_process(main(sys.argv[1:]))
