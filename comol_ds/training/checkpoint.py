"""Checkpoints: what trains, its optimizer, the schedule, every rank's random state, the position in the data.

    checkpoints/step_<n>/
        deepspeed/       DeepSpeed's own files, without the frozen weights
        rng_rank<r>.pt   random state of rank r
        adapter/         the adapter folder at this step, whole tensors
        state.json       step, and the settings that a resumed run must share
        COMMITTED        written last: size of every file; without it, or with a file short, the folder is not used

All ranks see one folder: --output_dir lies on a file system that they share.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig

from comol_ds.adapters.adapter_folder import write_adapter
from comol_ds.adapters.comol_layer import ADAPTER
from comol_ds.errors import UserError
from comol_ds.parallel.groups import World, together
from comol_ds.parallel.rng import rng_state, set_rng_state
from comol_ds.parallel.zero_partition import gather_adapter

MARKER = "COMMITTED"
_TAG = "deepspeed"


@dataclass(frozen=True)
class RunIdentity:
    """What two runs must have in common for one to continue the other bit-equally."""

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

    def check_same(self, found: dict[str, Any], where: Path) -> None:
        """Compare with the identity stored in a checkpoint.

        Raises:
            UserError: naming the first setting that differs and both values.
        """
        mine, theirs = _flatten(asdict(self)), _flatten(found)
        for name, value in mine.items():
            if theirs.get(name) != value:
                raise UserError(
                    f"checkpoint {where} was written with {name} = {theirs.get(name)}, this run has {value};"
                    " resume with the same setting or choose another --output_dir"
                )


def save_checkpoint(
    engine: Any, folder: Path, step: int, identity: RunIdentity, world: World, limit: int | None
) -> None:
    """Write and commit checkpoints/step_<n>, then delete the oldest beyond ``limit``. A collective call."""
    target = folder / f"step_{step}"
    together("clear the checkpoint folder", lambda: _clear(target) if world.rank == 0 else None)
    engine.save_checkpoint(str(target), tag=_TAG, save_latest=False, exclude_frozen_parameters=True)
    adapter = gather_adapter(engine)
    together("write the checkpoint", lambda: _write_own_files(engine, target, step, identity, world, adapter))
    together("commit the checkpoint", lambda: _commit(folder, target, limit) if world.rank == 0 else None)


def load_checkpoint(engine: Any, checkpoint: Path, world: World) -> None:
    """Restore everything but the data position, which follows from the step. A collective call."""
    path, _ = engine.load_checkpoint(str(checkpoint), tag=_TAG, load_module_strict=False)
    if path is None:
        raise RuntimeError(f"DeepSpeed found nothing to load in {checkpoint}")
    set_rng_state(torch.load(checkpoint / f"rng_rank{world.rank}.pt", weights_only=True))


def find_checkpoint(resume_from: str, folder: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, and a line for every unusable one that was passed over.

    Args:
        resume_from: ``latest``, or the path of one checkpoint.
        folder: the run's checkpoints folder.

    Returns:
        (None, ...) if ``latest`` was asked for and there is no checkpoint at all.

    Raises:
        UserError: a named checkpoint does not exist; or there are checkpoints and none is usable.
    """
    if resume_from == "latest":
        start, candidates = None, _by_step(folder)
    else:
        start = Path(resume_from)
        if not start.is_dir():
            raise UserError(f"--resume_from_checkpoint {resume_from}: no such folder; give a step_<n> folder or latest")
        step = _step_of(start)
        if step is None:
            raise UserError(f"--resume_from_checkpoint {resume_from}: not a step_<n> folder; give one or latest")
        candidates = [start, *(path for path in _by_step(start.parent) if _step_of(path) < step)]
    passed_over = []
    for path in candidates:
        fault = fault_of(path)
        if fault is None:
            return path, passed_over
        passed_over.append(f"checkpoint {path} is not usable: {fault}")
    if candidates:
        raise UserError(f"{passed_over[0]}; no committed checkpoint is left, start anew with --overwrite_output_dir")
    return None, passed_over


def read_step(checkpoint: Path, identity: RunIdentity) -> int:
    """Optimizer steps done at a committed checkpoint.

    Raises:
        UserError: another run's identity, see `RunIdentity.check_same`.
    """
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    identity.check_same(state["identity"], checkpoint)
    return state["step"]


def fault_of(checkpoint: Path) -> str | None:
    """Why the checkpoint must not be used; None if it is committed and every file has its committed size."""
    marker = checkpoint / MARKER
    if not marker.exists():
        return f"it has no {MARKER} marker, the save did not finish"
    try:
        sizes = json.loads(marker.read_text(encoding="utf-8"))["sizes"].items()
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {MARKER} marker is damaged"
    for name, size in sizes:
        file = checkpoint / name
        found = file.stat().st_size if file.exists() else None
        if found != size:
            return f"{name} is missing" if found is None else f"{name} has {found} of {size} bytes"
    return None


def _by_step(folder: Path) -> list[Path]:
    """All step_<n> folders, newest first."""
    steps = [path for path in folder.glob("step_*") if path.is_dir() and _step_of(path) is not None]
    return sorted(steps, key=_step_of, reverse=True)


def _step_of(path: Path) -> int | None:
    number = path.name.removeprefix("step_")
    return int(number) if path.name.startswith("step_") and number.isdigit() else None


def _clear(target: Path) -> None:
    if target.exists():
        shutil.rmtree(target)
    target.mkdir(parents=True)


def _write_own_files(
    engine: Any,
    target: Path,
    step: int,
    identity: RunIdentity,
    world: World,
    adapter: dict[str, torch.Tensor],
) -> None:
    torch.save(rng_state(), target / f"rng_rank{world.rank}.pt")
    if world.rank == 0:
        write_adapter(adapter, peft_config(engine), target / "adapter")
        state = {"step": step, "identity": asdict(identity)}
        (target / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


def peft_config(engine: Any) -> PeftConfig:
    """The adapter configuration of the engine's PEFT model."""
    return engine.module.peft_config[ADAPTER]


def _commit(folder: Path, target: Path, limit: int | None) -> None:
    files = [file for file in target.rglob("*") if file.is_file()]
    sizes = {str(file.relative_to(target)): file.stat().st_size for file in files}
    partial = target / f"{MARKER}.partial"
    partial.write_text(json.dumps({"sizes": sizes}, indent=2) + "\n", encoding="utf-8")
    partial.rename(target / MARKER)
    committed = [path for path in _by_step(folder) if (path / MARKER).exists()]
    for old in committed[limit:] if limit else []:
        if old != target:
            shutil.rmtree(old)


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat
