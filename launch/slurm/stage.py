"""Before training: copy the base's weights to this node's own disk. Takes launch/train.py's arguments; one per node.

The folder is COMOL_STAGE_DIR, from which launch/train.py then reads. Exit codes: 0 the copy is there, 2 it is not, with
a line on stderr that names the node, 75 asked to stop by SIGTERM or SIGUSR1, start again.
"""

import os
import signal
import sys
import time

from comol_ds import demo
from comol_ds.config_parser import parse_run_config
from comol_ds.errors import UserError
from comol_ds.parallel.groups import exit_process, node_name
from comol_ds.parallel.preflight import within
from comol_ds.parallel.staging import VARIABLE, stage, stage_dir
from comol_ds.parallel.weight_files import WeightFiles

EXIT_BAD_INPUT = 2
EXIT_START_AGAIN = 75
SECONDS = 3600  # 140 GB at 40 MB/s


def main(argv: list[str]) -> int:
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: os._exit(EXIT_START_AGAIN))
    start, node = time.monotonic(), node_name()
    try:
        config = parse_run_config(argv)
        model = parse_run_config(argv, demo.defaults_for(config)).model
        folder = stage_dir()
        if folder is None:
            raise UserError(f"{VARIABLE} is not set; name a folder on the node's own disk")
        if model.init_random:
            print(f"stage: node {node}: --init_random reads no weights")
            return 0
        seconds = float(os.environ.get("COMOL_STAGE_SECONDS", SECONDS))
        what = f"copying the weights to {VARIABLE} {folder}"
        copy, copied = within(seconds, what, lambda: stage(WeightFiles(model.model_name_or_path), folder))
    except UserError as error:
        print(f"stage: error: node {node}: {error}", file=sys.stderr, flush=True)
        return EXIT_BAD_INPUT
    done = f"{copied / 2**30:.3f} GiB copied in {time.monotonic() - start:.0f} s" if copied else "was there"
    print(f"stage: node {node}: {copy} {done}")
    return 0


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
