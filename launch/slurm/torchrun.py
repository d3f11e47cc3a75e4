"""torchrun whose ranks stand on the nodes in SLURM's order, and which ends with the exit code of the first that failed.

torchrun's own exit code is 1, whatever the ranks say. Its c10d rendezvous numbers the nodes by name, as text, and by
process id: rank 0, which prints and logs, would be on node10 rather than on node9, and the ranks' logs, which are named
by SLURM's tasks, would be another rank's. Hence the static rendezvous, with SLURM's number of this node.
"""

import os
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    try:
        main(["--node_rank", os.environ.get("SLURM_NODEID", "0"), *sys.argv[1:]])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        # a negative one is a signal's number
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
