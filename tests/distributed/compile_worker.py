"""One rank of the test of compiled engines: trains every case of a suite and saves what rank 0 sees.

A graph break inside an adapted layer is an error here, and layers that no graph holds are counted.

Usage: deepspeed compile_worker.py SUITE MODELS OUTPUT_FOLDER
"""

import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from comol_ds.adapters.comol_layer import CoMoLLinear
from comol_ds.config import RouterSettings
from comol_ds.parallel import groups
from comol_ds.parallel.assemble import Assembled
from tests.distributed.case_runner import run_worker, train_case
from tests.distributed.compiled_cases import COMPILED_SUITES, Compiled

UNCOMPILED = []  # inputs' shapes of the layers that ran outside of all graphs


def watch_layers() -> None:
    forward = CoMoLLinear.forward

    def watched(self: CoMoLLinear, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            UNCOMPILED.append(tuple(x.shape))
        with torch._dynamo.error_on_graph_break(True):
            return forward(self, x)

    CoMoLLinear.forward = watched


def train_compiled(compiled: Compiled, models: str) -> dict:
    def compile_engine(assembled: Assembled) -> None:
        assembled.engine.compile(backend=compiled.backend)

    torch._dynamo.reset()
    UNCOMPILED.clear()
    outcome = train_case(compiled.case, models, compile_engine, RouterSettings(router_load=compiled.statistics))
    return outcome | {"uncompiled": groups.gather_objects(list(UNCOMPILED), "report layers outside of graphs")}


def main() -> None:
    suite, models, output = sys.argv[-3:]
    watch_layers()
    cases = COMPILED_SUITES[suite]
    run_worker(((each.name, each.case, partial(train_compiled, each, models)) for each in cases), output)


if __name__ == "__main__":
    main()
    groups.exit_process(0)
