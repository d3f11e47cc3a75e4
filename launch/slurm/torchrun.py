"""torchrun with the exit code of the rank that failed first: torchrun's own is 1, whatever the ranks say."""

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    try:
        main()
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        # a negative one is a signal's number
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
