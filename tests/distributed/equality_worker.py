"""One rank of an equality test: trains every case of a suite in turn and saves what rank 0 sees.

Usage: deepspeed equality_worker.py SUITE MODELS OUTPUT_FOLDER
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from comol_ds.parallel import groups
from tests.distributed.case_runner import run_worker, train_case
from tests.distributed.equality_cases import SUITES


def main() -> None:
    suite, models, output = sys.argv[-3:]
    run_worker(((case.name, case, partial(train_case, case, models)) for case in SUITES[suite]), output)


if __name__ == "__main__":
    main()
    groups.exit_process(0)
