"""Which checkpoint a run continues, whether it may, and by which route."""

from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from comol_ds.checkpoint_names import MARKER, by_step, step_of
from comol_ds.errors import UserError
from comol_ds.parallel.groups import World, gather_objects, together
from comol_ds.text_files import read_json
from comol_ds.training.commit import STATE, damage_of, fault_of
from comol_ds.training.run_folder import RunFolder


@dataclass(frozen=True)
class RunIdentity:
    """What two runs must have in common for one to continue the other, and the layout, which may differ."""

    world_size: int
    tensor_parallel: int
    zero_stage: int
    bf16: bool
    global_batch: int
    micro_batch: int
    seed: int
    optim: str
    model: str
    adapter: dict[str, Any]
    data: dict[str, Any]
    router_losses: dict[str, float] = field(default_factory=dict)

    LAYOUT: ClassVar[tuple[str, ...]] = ("world_size", "tensor_parallel", "zero_stage", "micro_batch")

    def check_same(self, found: dict[str, Any], where: Path) -> list[str]:
        """Compare with the identity stored in a checkpoint.

        Returns:
            How the layout differs, as "zero_stage 3 -> 2"; empty if this run can be bit-equal to the one before.

        Raises:
            UserError: naming the first setting that differs and both values.
        """
        mine, theirs = _flatten(asdict(self)), _flatten(found)
        for name, value in mine.items():
            if name not in self.LAYOUT and theirs.get(name) != value:
                raise UserError(
                    f"checkpoint {where} was written with {name} = {theirs.get(name)}, this run has {value};"
                    " resume with the same setting or choose another --output_dir"
                )
        return [f"{name} {theirs.get(name)} -> {mine[name]}" for name in self.LAYOUT if theirs.get(name) != mine[name]]


@dataclass(frozen=True)
class Resume:
    """The checkpoint that a run continues.

    Attributes:
        path: its folder.
        step: optimizer steps done.
        moved: how the layout differs, see `RunIdentity.check_same`.
    """

    path: Path
    step: int
    moved: list[str]

    @property
    def route(self) -> str:
        """Which of the two ways into the engine is taken, in words."""
        if not self.moved:
            return "by DeepSpeed's own files (same layout)"
        return f"by the canonical state (another layout: {', '.join(self.moved)}; dropout draws new masks)"


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
    checkpoint, passed_over = find_checkpoint(resume_from, folder.checkpoints, damaged)
    if checkpoint is None:
        return None, passed_over
    if checkpoint.parent.resolve() != folder.checkpoints.resolve():
        folder.check_free(overwrite=False)
        return read_checkpoint(checkpoint, identity), passed_over
    newest, _ = find_checkpoint("latest", folder.checkpoints, damaged)
    if newest.resolve() != checkpoint.resolve():
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: {newest} is newer and would be mixed with what follows; delete it,"
            " resume from it, or choose another --output_dir"
        )
    return read_checkpoint(checkpoint, identity), passed_over


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


def read_checkpoint(checkpoint: Path, identity: RunIdentity) -> Resume:
    """How a run continues a committed checkpoint.

    Raises:
        UserError: another run's identity, see `RunIdentity.check_same`.
    """
    state = read_state(checkpoint)
    return Resume(checkpoint, state["step"], identity.check_same(state["identity"], checkpoint))


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
    """state.json of a checkpoint."""
    return read_json(checkpoint / STATE)


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat
