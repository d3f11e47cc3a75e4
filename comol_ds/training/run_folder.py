"""The run folder: where everything of a run is written, and what is written there while it trains."""

import json
import os
import shutil
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import yaml

from comol_ds.checkpoint_names import by_step
from comol_ds.config import RunConfig
from comol_ds.errors import UserError


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
                    with TemporaryFile(dir=folder):
                        pass
        except OSError as error:
            raise UserError(
                f"--output_dir {self.path} cannot be written: {error.strerror}; choose another folder"
            ) from error
        if not is_folder:
            raise UserError(f"--output_dir {self.path}: {existing} is a file; choose a folder")

    def check_free(self, overwrite: bool) -> None:
        """Refuse to mix two runs. Reads only; not to be asked when resuming.

        Raises:
            UserError: checkpoints of an earlier run, and ``overwrite`` is false.
        """
        if not overwrite and by_step(self.checkpoints):
            raise UserError(
                f"--output_dir {self.path} holds checkpoints of an earlier run; continue it with"
                " --resume_from_checkpoint, delete it with --overwrite_output_dir, or choose another folder"
            )

    def prepare(self, config: RunConfig, ds_config: dict[str, Any], from_step: int) -> None:
        """Create the folder, write the resolved configuration, drop log lines past the step we start from."""
        if config.run.overwrite_output_dir:
            self._delete_earlier_run()
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "config.yaml").write_text(yaml.safe_dump(config.flat(), sort_keys=False), encoding="utf-8")
        (self.path / "ds_config.json").write_text(json.dumps(ds_config, indent=2) + "\n", encoding="utf-8")
        kept = from_step if from_step else -1  # a run that starts anew evaluates at step 0 again
        for log in (self.metrics, self.router_load, self.evaluations):
            _keep_until(log, kept)
        # answers are written before the evaluation that they belong to, which may have to be done again
        _keep_until(self.answers, kept if self.was_evaluated(kept) else kept - 1)

    def was_evaluated(self, step: int) -> bool:
        """Whether evaluations.jsonl has a line of this step."""
        if not self.evaluations.exists():
            return False
        lines = self.evaluations.read_text(encoding="utf-8").splitlines()
        return any(json.loads(line)["step"] == step for line in lines)

    def _delete_earlier_run(self) -> None:
        """Delete what a run writes, and only that: --output_dir may hold other things."""
        for folder in (self.checkpoints, self.adapter, self.path / "tensorboard"):
            shutil.rmtree(folder, ignore_errors=True)
        for log in (self.metrics, self.router_load, self.evaluations, self.answers):
            log.unlink(missing_ok=True)


def append_json_line(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON object as one line.

    Raises:
        RuntimeError: the disk is full, or cannot be written any more.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise RuntimeError(
            f"{path} cannot be written: {error}; make room and continue with --resume_from_checkpoint"
        ) from error


def _keep_until(path: Path, step: int) -> None:
    """Drop the lines of steps after ``step``: a resumed run writes them again. A half-written last line goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            break
    path.write_text("".join(kept), encoding="utf-8")
