"""Before training: can every node write the output folder, and reach the others? Takes launch/train.py's arguments.

Exit codes: 0 yes, 2 no, with a line on stderr for each fault that names the node.
"""

import os
import sys

from comol_ds import demo
from comol_ds.config_parser import parse_run_config
from comol_ds.errors import UserError
from comol_ds.parallel.groups import World, exit_process, node_name, read_world
from comol_ds.parallel.preflight import check_nodes

EXIT_BAD_INPUT = 2
SECONDS = 120  # for a write; a collective has twice as long, the first over hundreds of GPUs takes tens of seconds


def main(argv: list[str]) -> int:
    world = World(0, 1, 0)
    try:
        world = read_world()
        config = parse_run_config(argv)
        folder = parse_run_config(argv, demo.defaults_for(config)).run.output_dir
        seconds = float(os.environ.get("COMOL_PREFLIGHT_SECONDS", SECONDS))
        faults = check_nodes(world, node_name(), folder, seconds)
    except UserError as error:
        faults = [str(error)] if world.rank == 0 else []
    for fault in faults:
        print(f"preflight: error: {fault}", file=sys.stderr, flush=True)
    if faults:
        return EXIT_BAD_INPUT
    if world.rank == 0:
        print(f"preflight: {world.size} ranks reach each other, and every node writes {folder}")
    return 0


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
