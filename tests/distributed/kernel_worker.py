"""One rank of an equality test that counts how often Triton's kernels mixed; COMOL_KERNEL is its environment's.

Usage: deepspeed kernel_worker.py SUITE MODELS OUTPUT_FOLDER
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from comol_ds.adapters import mixing_triton
from comol_ds.parallel import groups
from tests.distributed.case_runner import run_worker, train_case
from tests.distributed.equality_cases import SUITES, Case

PASSES = ("forward", "backward")
CALLS = dict.fromkeys(PASSES, 0)


def count(name: str) -> None:
    kernel = getattr(mixing_triton, name)

    def counted(*args):
        CALLS[name] += 1
        return kernel(*args)

    setattr(mixing_triton, name, counted)


def train_counted(case: Case, models: str) -> dict:
    CALLS.update(dict.fromkeys(PASSES, 0))
    outcome = train_case(case, models)
    return outcome | {"kernels": groups.gather_objects(dict(CALLS), "count the kernels")}


def main() -> None:
    suite, models, output = sys.argv[-3:]
    for name in PASSES:
        count(name)
    run_worker(((case.name, case, partial(train_counted, case, models)) for case in SUITES[suite]), output)


if __name__ == "__main__":
    main()
    groups.exit_process(0)
