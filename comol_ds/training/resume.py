"""Which checkpoint a run continues, whether it may, and by which route."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from comol_ds.checkpoint_names import MARKER, by_step, step_of
from comol_ds.errors import UserError, one_line
from comol_ds.parallel.groups import World, gather_objects, together
from comol_ds.text_files import read_json
from comol_ds.training.commit import STATE, damage_of, fault_of
from comol_ds.training.identity import Difference, RunIdentity
from comol_ds.training.run_folder import RunFolder


@dataclass(frozen=True)
class Resume:
    """The checkpoint that a run continues.

    Attributes:
        path: its folder.
        step: optimizer steps done.
        difference: between this run and the one that wrote it.
        is_own: whether it lies in this run's folder. Files of another one are read as tensors and JSON only: loading
            DeepSpeed's, which are pickles, would run what code they hold.
    """

    path: Path
    step: int
    difference: Difference
    is_own: bool

    @property
    def is_native(self) -> bool:
        """Whether the engine continues from DeepSpeed's own files, bit by bit."""
        return self.is_own and not self.difference.moved

    @property
    def route(self) -> str:
        """Which of the two ways into the engine is taken, in words."""
        if self.is_native:
            return "by DeepSpeed's own files (same layout)"
        moved = [f"another layout: {', '.join(self.difference.moved)}"] if self.difference.moved else []
        reasons = [*moved, *["another run's folder"] * (not self.is_own), "dropout draws new masks"]
        return f"by the canonical state ({'; '.join(reasons)})"


def plan_resume(
    resume_from: str, folder: RunFolder, identity: RunIdentity, damaged: dict[Path, str] | None = None
) -> tuple[Resume | None, list[str]]:
    """The checkpoint to continue, and a line for each unusable one passed over, such that two runs do not mix.

    Args:
        resume_from: ``latest`` or a checkpoint's path.
        folder: the run's folder.
        identity: of this run.
        damaged: checkpoints whose content was found to be wrong -> how.

    Raises:
        UserError: no usable checkpoint; the run folder belongs to another run, or to this one's future.
    """
    folder.check_ours()
    checkpoint, passed_over = find_checkpoint(resume_from, folder.checkpoints, damaged)
    if checkpoint is None:
        folder.check_unfinished()
        return None, passed_over
    if checkpoint.parent.resolve() != folder.checkpoints.resolve():
        folder.check_free(overwrite=False)
        return read_checkpoint(checkpoint, identity, folder), passed_over
    newest, _ = find_checkpoint("latest", folder.checkpoints, damaged)
    if newest.resolve() != checkpoint.resolve():
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: {newest} is newer and would be mixed with what follows; delete it,"
            " resume from it, or choose another --output_dir"
        )
    return read_checkpoint(checkpoint, identity, folder), passed_over


def settle_resume(
    resume_from: str, folder: RunFolder, identity: RunIdentity, world: World
) -> tuple[Resume | None, list[str]]:
    """`plan_resume` again, now that no other run can commit, by all ranks together, and every byte is read.

    Each rank reads its share of the files; a checkpoint that is not what was written is passed over. A collective call.

    Raises:
        UserError: see `plan_resume`; on every rank.
    """
    damaged: dict[Path, str] = {}
    while True:
        mine = together("find the checkpoint", partial(plan_resume, resume_from, folder, identity, damaged))
        # rank 0's answer for all: another node may still see an older list of the folder
        resume, passed_over = gather_objects(mine, "agree on the checkpoint")[0]
        damage = None if resume is None else _find_damage(resume.path, world)
        if damage is None:
            return resume, passed_over
        damaged[resume.path] = damage


def _find_damage(checkpoint: Path, world: World) -> str | None:
    """The first damage that any rank finds, on every rank."""
    mine = together("verify the checkpoint", partial(damage_of, checkpoint, world.rank, world.size))
    return next((found for found in gather_objects(mine, "compare the checksums") if found), None)


def read_checkpoint(checkpoint: Path, identity: RunIdentity, folder: RunFolder) -> Resume:
    """How a run with this folder continues a committed checkpoint.

    Raises:
        UserError: another run's identity, see `RunIdentity.compare`; or as `read_state`.
    """
    state = read_state(checkpoint)
    is_own = checkpoint.resolve().parent == folder.checkpoints.resolve()
    try:
        difference = identity.compare(state["identity"], checkpoint)
    except RecursionError as error:
        raise UserError(f"{checkpoint / STATE} is nested too deeply; resume from another checkpoint") from error
    return Resume(checkpoint, state["step"], difference, is_own)


def find_checkpoint(
    resume_from: str, folder: Path, damaged: dict[Path, str] | None = None
) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, and a line for every unusable one that was passed over.

    Args:
        resume_from: ``latest``, or the path of one checkpoint.
        folder: the run's checkpoints folder.
        damaged: checkpoints whose content was found to be wrong -> how.

    Returns:
        (None, ...) if ``latest`` was asked for and nothing was ever committed.

    Raises:
        UserError: a named checkpoint does not exist; or there are committed checkpoints and none is usable.
    """
    if resume_from == "latest":
        candidates = by_step(folder)
    else:
        start = Path(resume_from)
        if not start.is_dir():
            raise UserError(f"--resume_from_checkpoint {resume_from}: no such folder; give a step_<n> folder or latest")
        step = step_of(start)
        if step is None:
            raise UserError(f"--resume_from_checkpoint {resume_from}: not a step_<n> folder; give one or latest")
        candidates = [start, *(path for path in by_step(start.parent) if step_of(path) < step)]
    passed_over = []
    for path in candidates:
        fault = (damaged or {}).get(path) or fault_of(path)
        if fault is None:
            return path, passed_over
        passed_over.append(f"checkpoint {path} is not usable: {fault}")
    never_committed = not any((path / MARKER).exists() for path in candidates)
    if resume_from == "latest" and never_committed:
        return None, passed_over
    raise UserError(f"{passed_over[0]}; no committed checkpoint is left, start anew with --overwrite_output_dir")


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint.

    Raises:
        UserError: it cannot be read, or is not what a checkpoint of this step has.
    """
    file = checkpoint / STATE
    try:
        state = read_json(file)
        if type(state["step"]) is not int or state["step"] != step_of(checkpoint):
            raise ValueError(f"step is {state['step']!r:.40}")
        if not all(isinstance(state[name], dict) for name in ("identity", "router_losses")):
            raise ValueError("identity and router_losses must be objects")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} cannot be used ({one_line(error, 200)}); resume from another checkpoint") from error
    return state
