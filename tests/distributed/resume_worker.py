"""One rank of the resume test: every case trained through, and again in two halves with a checkpoint between them.

Usage: deepspeed resume_worker.py MODELS OUTPUT_FOLDER; on four ranks the tensor-parallel cases.
"""

import sys
from dataclasses import astuple
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from comol_ds.parallel import groups
from comol_ds.parallel.zero_partition import gather_adapter
from comol_ds.training.checkpoint import CheckpointWriter, load_checkpoint
from comol_ds.training.identity import RunIdentity
from comol_ds.training.resume import read_checkpoint
from comol_ds.training.router_load import RouterLoad
from comol_ds.training.run_folder import RunFolder
from tests.distributed.case_runner import build_case, run_steps
from tests.distributed.equality_cases import RESUME_CASES, TP_RESUME_CASES, Case
from tests.distributed.stored_state import assert_holds_what_is_stored


def train(case: Case, models: str, world: groups.World, folder: RunFolder, steps: range) -> dict:
    """Steps of a case; those that do not start at 0 start from the checkpoint at their first one."""
    assembled = build_case(case, models)
    engine = assembled.engine
    identity = RunIdentity(world.size, case.tensor_parallel, 0, False, 8, 4, 7, case.optim, models, {}, {})
    writer = CheckpointWriter(folder.checkpoints, folder.generations, identity, world, None, 60)
    if steps.start:
        resume = read_checkpoint(folder.checkpoints / f"step_{steps.start}", identity, folder)
        assert resume.is_native
        load_checkpoint(assembled, resume, identity, world)
        assert_holds_what_is_stored(engine, resume.path)
    results = [astuple(result) for result in run_steps(assembled, case, RouterLoad(engine.module), steps)]
    writer.save(assembled, steps.stop)
    writer.finish()
    outcome = {"results": results, "weights": gather_adapter(engine)}
    engine.destroy()
    return outcome


def main() -> None:
    models, output = sys.argv[-2:]
    world = groups.read_world()
    groups.initialize(world, timeout_minutes=2)
    for case in TP_RESUME_CASES if world.size == 4 else RESUME_CASES:
        groups.arrange(case.tensor_parallel)
        half = case.steps // 2
        through = train(case, models, world, RunFolder(f"{output}/{case.name}-through"), range(case.steps))
        halves = RunFolder(f"{output}/{case.name}-halves")
        train(case, models, world, halves, range(half))
        resumed = train(case, models, world, halves, range(half, case.steps))
        if world.rank == 0:
            torch.save({"through": through, "resumed": resumed}, Path(output) / f"{case.name}.pt")
    groups.shut_down()


if __name__ == "__main__":
    main()
    groups.exit_process(0)
