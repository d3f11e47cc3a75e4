"""Fine-tune a causal language model with CoMoL adapters: deepspeed launch/train.py --ds_config ds_configs/zero3.json

Starts equally under deepspeed, torchrun, srun python and plain python. Exit codes: 0 done, 2 bad configuration or
input, anything else a crash.
"""

import sys
import time

from comol_ds.errors import UserError

EXIT_BAD_INPUT = 2


def main(argv: list[str]) -> int:
    from comol_ds import demo
    from comol_ds.config_parser import parse_run_config
    from comol_ds.parallel.groups import read_world

    rank = 0
    try:
        world = read_world()
        rank = world.rank
        config = parse_run_config(argv)
        config = parse_run_config(argv, demo.defaults_for(config))
        from comol_ds.training.loop import run

        run(config, world)
    except UserError as error:
        if rank != 0:
            # rank 0 tells the user; a launcher that sees us exit first would kill it before it has
            time.sleep(10)
        else:
            print(f"train.py: error: {error}", file=sys.stderr, flush=True)
        return EXIT_BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
