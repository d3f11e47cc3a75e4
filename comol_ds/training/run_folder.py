"""The run folder: where everything of a run is written, and what is written there while it trains."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import yaml

from comol_ds.checkpoint_names import MARKER, by_step
from comol_ds.config import RunConfig
from comol_ds.errors import UserError
from comol_ds.files import remove, replace_file
from comol_ds.output_folder import RUN_MARK, is_taken, marked_files, refuse_inputs_in, write_mark
from comol_ds.text_files import read_json
from comol_ds.training.commit import STATE
from comol_ds.training.generation import newest_generation
from comol_ds.training.log_files import has_step, keep_until

# Every name that a run writes in its folder, whichever file of the package does it. Checkpoints are deleted first.
_SETTINGS = ("config.yaml", "ds_config.json")
WRITTEN = (
    "checkpoints", "adapter", "tensorboard", "stacks", "heartbeats", "generations", *_SETTINGS,
    "metrics.jsonl", "evaluations.jsonl", "router_load.jsonl", "generations.jsonl", "STOP",
)  # fmt: skip
_PROBE = ".comol_probe"
_PASSING = (_PROBE, ".nfs")  # what another rank writes there for a moment


class RunFolder:
    """Paths below --output_dir and writers for them. Rank 0 writes; the other ranks only ask for paths."""

    def __init__(self, output_dir: str):
        self.path = Path(output_dir)
        self.checkpoints = self.path / "checkpoints"
        self.generations = self.path / "generations"
        self.adapter = self.path / "adapter"
        self.metrics = self.path / "metrics.jsonl"
        self.router_load = self.path / "router_load.jsonl"
        self.evaluations = self.path / "evaluations.jsonl"
        self.answers = self.path / "generations.jsonl"

    def check_writable(self) -> None:
        """Refuse a folder in which nothing can be written, by writing a file that has no name.

        Raises:
            UserError: a file is in the way, or nothing can be written.
        """
        try:
            # a link that leads nowhere exists too: mkdir would find it
            existing = next(path for path in (self.path, *self.path.absolute().parents) if os.path.lexists(path))
            is_folder = existing.is_dir()
            for folder in (existing, self.checkpoints) if is_folder else ():
                if folder.is_dir():
                    with TemporaryFile(dir=folder, prefix=_PROBE):
                        pass
        except OSError as error:
            raise UserError(
                f"--output_dir {self.path} cannot be written: {error.strerror}; choose another folder"
            ) from error
        if not is_folder:
            raise UserError(f"--output_dir {self.path}: {existing} is a file; choose a folder")

    def check_ours(self, overwrite: bool = False) -> None:
        """Refuse a folder in which a run would overwrite or delete what no run has written. Reads only.

        A run is known by its mark. One from before there were marks has a claim and a committed checkpoint with the
        state of a run.

        Raises:
            UserError: naming what is there; or, to be overwritten, a folder of an earlier run that lies elsewhere.
        """
        if self._is_run():
            linked = next((path for path in self._deleted() if path.is_symlink() and path.is_dir()), None)
            if overwrite and linked is not None:
                raise UserError(
                    f"--overwrite_output_dir: {linked} is a link to {linked.resolve()}, where nothing is deleted;"
                    " delete the link yourself or choose another --output_dir"
                )
            return
        if overwrite and self.path.is_dir() and not all(path.name.startswith(_PASSING) for path in self.path.iterdir()):
            raise UserError(
                f"--overwrite_output_dir: {self.path} is not empty and has no {RUN_MARK}, the mark of an earlier run;"
                " choose another --output_dir or empty it yourself"
            )
        taken = next((path for path in self._written() if is_taken(path)), None)
        if taken is not None:
            raise UserError(
                f"--output_dir {self.path} is no run folder, and {taken} would be overwritten; move it elsewhere or"
                " choose another folder"
            )

    def check_free(self, overwrite: bool) -> None:
        """Refuse to mix two runs, or a run with what is none. Reads only; not to be asked when resuming.

        Raises:
            UserError: checkpoints or the adapter of an earlier run, and ``overwrite`` is false; or as `check_ours`.
        """
        self.check_ours(overwrite)
        if not overwrite and by_step(self.checkpoints):
            raise UserError(
                f"--output_dir {self.path} holds checkpoints of an earlier run; continue it with"
                " --resume_from_checkpoint, delete it with --overwrite_output_dir, or choose another folder"
            )
        if not overwrite:
            self.check_unfinished()

    def check_unfinished(self) -> None:
        """Refuse to train anew where the adapter of a finished run lies.

        Raises:
            UserError: it does.
        """
        if is_taken(self.adapter):
            raise UserError(
                f"--output_dir {self.path} holds the adapter of an earlier run and no checkpoint to continue; delete"
                " both with --overwrite_output_dir, or choose another folder"
            )

    def check_inputs(self, inputs: Iterable[str | Path], resumes: bool) -> None:
        """Refuse to read what this run deletes or overwrites. A resumed run may be given its own settings again.

        Raises:
            UserError: see `refuse_inputs_in`.
        """
        refuse_inputs_in(inputs, [path for path in self._written() if not (resumes and path.name in _SETTINGS)])

    def take(self) -> None:
        """Create the folder, unless something has come there since it was checked, and say that it is a run's.

        Raises:
            UserError: see `check_ours`; or it cannot be written.
        """
        self.check_ours()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_mark(self.path, RUN_MARK)
        except OSError as error:
            raise UserError(f"--output_dir {self.path} cannot be written: {error}; choose another folder") from error

    def prepare(self, config: RunConfig, ds_config: dict[str, Any], from_step: int) -> None:
        """Delete an earlier run if asked to, write the resolved configuration, drop log lines past the step we start
        from.

        Raises:
            UserError: something cannot be deleted, or written.
        """
        if config.run.overwrite_output_dir:
            self._delete_earlier_run()
        kept = from_step if from_step else -1  # a run that starts anew evaluates at step 0 again
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            replace_file(self.path / "config.yaml", [yaml.safe_dump(config.flat(), sort_keys=False)])
            replace_file(self.path / "ds_config.json", [json.dumps(ds_config, indent=2) + "\n"])
            for log in (self.metrics, self.router_load, self.evaluations):
                keep_until(log, kept)
            # answers are written before the evaluation that they belong to, which may have to be done again
            keep_until(self.answers, kept if self.was_evaluated(kept) else kept - 1)
        except OSError as error:
            raise UserError(f"--output_dir {self.path} cannot be written: {error}; make room there") from error

    def was_evaluated(self, step: int) -> bool:
        """Whether evaluations.jsonl has a line of this step."""
        return has_step(self.evaluations, step)

    def _written(self) -> list[Path]:
        return [self.path / name for name in WRITTEN]

    def _deleted(self) -> list[Path]:
        """Of an earlier run; its claims stay, so that an older process is still locked out."""
        return [path for path in self._written() if path.name not in (*_SETTINGS, "generations", "STOP")]

    def _is_run(self) -> bool:
        if marked_files(self.path, RUN_MARK) is not None:
            return True
        return newest_generation(self.generations) > 0 and any(map(_holds_state, by_step(self.checkpoints)))

    def _delete_earlier_run(self) -> None:
        """Delete what a run writes, and only that: --output_dir may hold other things."""
        try:
            for path in self._deleted():
                remove(path)
        except OSError as error:
            raise UserError(
                f"--overwrite_output_dir: {error.filename} cannot be deleted: {error.strerror}; delete it yourself or"
                " choose another --output_dir"
            ) from error


def _holds_state(checkpoint: Path) -> bool:
    """Whether it is a committed checkpoint of ours."""
    try:
        return (checkpoint / MARKER).is_file() and {"step", "identity"} <= read_json(checkpoint / STATE).keys()
    except (OSError, ValueError, AttributeError):
        return False
