"""Checkpoints: what is in one, how it is taken from the engine, and how a run continues it.

    checkpoints/step_<n>/
        deepspeed/                          DeepSpeed's own files, without the frozen weights
        rng_rank<r>.pt                      random state of rank r
        training_state/tensors.safetensors  whole fp32 tensors <kind>:<parameter>, the same on every layout
        adapter/                            the adapter folder at this step, whole tensors, and the tokenizer
        state.json                          step, data position, schedule, hyperparameters, identity, versions
        COMMITTED                           the manifest, see `comol_ds.training.commit`

A run on the same layout continues from DeepSpeed's files and the random states, bit by bit. On another layout it
continues from the training state: what is trained, on which records, at which learning rate is the same, and the losses
are equal but for the order of additions. Random numbers (dropout masks) are then drawn anew, from seed, step and
data-parallel rank, because a rank's stored random state belongs to that rank's records.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import torch
from peft import PeftConfig
from safetensors import SafetensorError, safe_open

from comol_ds.adapters.adapter_folder import write_adapter
from comol_ds.adapters.comol_layer import ADAPTER
from comol_ds.errors import UserError, one_line
from comol_ds.parallel.assemble import Assembled
from comol_ds.parallel.groups import World, gather_objects, mesh, together
from comol_ds.parallel.native_state import capture_native_files, load_native_files
from comol_ds.parallel.rng import derive_rng_state, rng_state, set_rng_state
from comol_ds.parallel.training_state import (
    STEP,
    VALUES,
    continue_schedule,
    gather_training_state,
    optimizer_hyperparameters,
    restore_training_state,
    stored_kinds,
)
from comol_ds.parallel.zero_partition import adapter_state_dict
from comol_ds.tensor_files import save_tensors
from comol_ds.training.commit import STATE, Committer, Target, remove_leftovers, write_part
from comol_ds.training.generation import Generation, claim_generation
from comol_ds.training.identity import RunIdentity
from comol_ds.training.resume import Resume, read_state

T = TypeVar("T")
_NATIVE = "deepspeed"
_TENSORS = Path("training_state") / "tensors.safetensors"


class CheckpointWriter:
    """The checkpoints of one run that owns its folder: the state is copied now, written and committed in a thread.

    At most one checkpoint is in flight, so that host memory holds one copy of what this rank trains. Threads use no
    collective: every rank leaves its part in the folder, and rank 0's thread looks for all of them. Whether it worked
    is agreed upon between the ranks when the next checkpoint is due, or in `finish`.
    """

    def __init__(
        self,
        checkpoints: Path,
        generations: Path,
        identity: RunIdentity,
        world: World,
        keep: int | None,
        wait_seconds: float,
        tokenizer: Mapping[str, bytes] | None = None,
    ) -> None:
        """Claim the run folder, and delete what runs that ended inside a save have left. A collective call.

        ``tokenizer`` has the files that lie in every checkpoint's adapter folder, see `kept_tokenizer.tokenizer_files`.

        Raises:
            UserError: the folder cannot be written; on every rank.
        """

        def claim() -> tuple[int, list[str]]:
            if world.rank != 0:
                return 0, []
            try:
                return claim_generation(generations).number, remove_leftovers(checkpoints)
            except OSError as error:
                raise UserError(
                    f"--output_dir {generations.parent} cannot be written: {error}; choose another folder"
                ) from error

        number, self.removed = gather_objects(together("claim the run folder", claim), "tell the claim")[0]
        self._checkpoints, self._identity, self._world, self._wait = checkpoints, identity, world, wait_seconds
        self._generation = Generation(generations, number)
        self._committer = Committer(world.size, self._generation, keep, wait_seconds)
        self._tokenizer = tokenizer
        self._flight: _Flight | None = None

    def check_claim(self) -> None:
        """To be asked before a line is logged: whoever has claimed the folder since writes the lines of these steps.

        Raises:
            Overtaken: another run has; on rank 0, which writes the logs.
        """
        if self._world.rank == 0:
            self._generation.check()

    def save(self, assembled: Assembled, step: int) -> None:
        """Take a copy of everything and start to write it, after the one before is committed. A collective call.

        Raises:
            RuntimeError: the checkpoint before could not be written; see `finish`.
        """
        self.finish()
        target = Target(self._checkpoints, step, self._generation.number)
        writers = _take(assembled, step, self._identity, self._world, self._tokenizer)
        written = _in_thread(lambda: write_part(target, self._world.rank, writers))
        commits = self._world.rank == 0
        self._flight = _Flight(target, written, _in_thread(lambda: self._committer.commit(target) if commits else None))

    def finish(self) -> None:
        """Wait until the checkpoint in flight is committed. A collective call.

        Raises:
            Overtaken: another run has claimed the folder since; a RuntimeError with its message on ranks but 0.
            RuntimeError: a rank could not write its part in time, or rank 0 not commit; on every rank.
        """
        if self._flight is None:
            return
        flight, self._flight = self._flight, None
        name, limit = flight.target.name, self._wait
        try:
            together(f"write {name}", lambda: _result(flight.written, limit, f"writing {name}"))
        except BaseException:
            self._committer.given_up.set()
            if self._world.rank == 0:  # every rank has ended its part, or this one has lost the others
                shutil.rmtree(flight.target.writing, ignore_errors=True)
            raise
        together(f"commit {name}", lambda: _result(flight.committed, limit, f"committing {name}"))

    def land(self, seconds: float = 60) -> None:
        """Let this rank end what is in flight before the process ends on an error. Asks no other rank."""
        if self._flight is None:
            return
        wait([self._flight.written], seconds)
        if self._flight.written.done() and self._flight.written.exception() is None:
            wait([self._flight.committed], seconds)


@dataclass(frozen=True)
class _Flight:
    """A checkpoint on its way to the disk; on ranks but 0 nothing is to be committed."""

    target: Target
    written: Future
    committed: Future


def _in_thread(action: Callable[[], T]) -> "Future[T]":
    """The action's result to come. The thread does not keep the process alive: one that crashes must end."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=work, daemon=True).start()
    return future


def _result(future: "Future[T]", seconds: float, what: str) -> T:
    try:
        return future.result(seconds)
    except TimeoutError as error:
        raise RuntimeError(f"{what} has not ended after {seconds:.0f} s; is the file system stuck?") from error


def _take(
    assembled: Assembled, step: int, identity: RunIdentity, world: World, tokenizer: Mapping[str, bytes] | None
) -> dict[str, Callable[[Path], None]]:
    """A copy in host memory of this rank's part of a checkpoint, as writers of its files. A collective call."""
    engine = assembled.engine
    native, random = capture_native_files(engine, _NATIVE), rng_state()
    writers = {f"{_NATIVE}/{name}": torch_writer(content) for name, content in native.items()}
    writers[f"rng_rank{world.rank}.pt"] = torch_writer(random)
    state = gather_training_state(engine)
    if world.rank != 0:
        return writers
    adapter, config = adapter_state_dict(engine.module, state[VALUES]), peft_config(engine)
    described = _describe(assembled, step, identity, state.keys() - {VALUES})
    named = {f"{kind}:{name}": tensor for kind, tensors in state.items() for name, tensor in tensors.items()}
    return writers | {
        str(_TENSORS): lambda path: save_tensors(named, path),
        "adapter": lambda path: write_adapter(adapter, config, path, tokenizer),
        STATE: lambda path: path.write_text(described, encoding="utf-8"),
    }


def torch_writer(content: Any) -> Callable[[Path], None]:
    """Writes a file for torch.load."""

    def write(path: Path) -> None:
        with path.open("wb") as file:  # torch's own keeps it open after an error, and a full disk full
            torch.save(content, file)

    return write


def _describe(assembled: Assembled, step: int, identity: RunIdentity, optimizer_state: set[str]) -> str:
    """state.json. The data position counts samples (records, or packed rows) since the start, epoch after epoch."""
    engine = assembled.engine
    values = {
        "step": step,
        "data_position": {"samples": step * identity.global_batch},
        "identity": asdict(identity),
        "optimizer": {"state": sorted(optimizer_state), "groups": optimizer_hyperparameters(engine)},
        "schedule": engine.lr_scheduler.state_dict(),
        "router_losses": assembled.router_losses.state_dict(),
        "versions": {name: version(name) for name in ("torch", "deepspeed", "transformers", "peft")},
    }
    return json.dumps(values, indent=2) + "\n"


def load_checkpoint(assembled: Assembled, resume: Resume, identity: RunIdentity, world: World) -> None:
    """Restore everything but the data position, which follows from the step. A collective call.

    On the same layout also the random states; on another one dropout draws new masks, see the module's docstring.
    Learning rate, schedule and the optimizer's other settings are this run's own: the checkpoint's count for the steps
    that it holds.

    Raises:
        UserError: the state does not fit this run's model and optimizer, or cannot be read; on every rank.
    """
    engine, state = assembled.engine, read_state(resume.path)
    settings = optimizer_hyperparameters(engine)
    assembled.router_losses.load_state_dict(state["router_losses"])
    if resume.is_native:
        load_native_files(engine, resume.path, _NATIVE)
        set_rng_state(torch.load(resume.path / f"rng_rank{world.rank}.pt", weights_only=True))
    else:
        _load_tensors(engine, resume.path / _TENSORS, resume.step)
        engine.global_steps = resume.step
        engine.global_samples = resume.step * identity.global_batch
        engine.micro_steps = resume.step * engine.gradient_accumulation_steps()
        derive_rng_state(identity.seed, resume.step, mesh().grid.dp_rank)
    continue_schedule(engine, settings, resume.step)


def _load_tensors(engine: Any, path: Path, step: int) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            shapes: dict[str, dict[str, tuple[int, ...]]] = {}
            for key in file.keys():  # noqa: SIM118 - no dict
                kind, _, name = key.partition(":")
                shapes.setdefault(kind, {})[name] = tuple(file.get_slice(key).get_shape())
            kinds = together("compare the stored tensors", lambda: stored_kinds(engine, shapes, path))
            if {float(file.get_tensor(f"{STEP}:{name}")) for name in kinds.get(STEP, ())} - {float(step)}:
                raise UserError(f"{path}: a parameter was not stepped {step} times; resume from another checkpoint")
            restore_training_state(engine, kinds, lambda kind, name: file.get_tensor(f"{kind}:{name}"))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}; resume from another checkpoint") from error


def peft_config(engine: Any) -> PeftConfig:
    """The adapter configuration of the engine's PEFT model."""
    return engine.module.peft_config[ADAPTER]
