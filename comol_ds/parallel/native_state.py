"""DeepSpeed's own checkpoint files: taken as values in host memory, to be written elsewhere and at another time."""

from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.checkpoint.utils import clone_tensors_for_torch_save
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine


def capture_native_files(engine: DeepSpeedEngine, tag: str) -> dict[str, Any]:
    """What DeepSpeed would write on this rank, file name -> content, as a copy in host memory. A collective call.

    The frozen weights are left out. DeepSpeed writes between barriers, and a rank whose disk is full would leave the
    others waiting there; so nothing is written here.
    """
    theirs, taken = engine.checkpoint_engine, _Taken()
    engine.checkpoint_engine = taken
    engine._copy_recovery_script = lambda save_path: None  # rank 0 alone would write, a script that we do not need
    try:
        engine.save_checkpoint("nowhere", tag=tag, save_latest=False, exclude_frozen_parameters=True)
    finally:
        engine.checkpoint_engine = theirs
        del engine._copy_recovery_script
    return taken.files


def load_native_files(engine: DeepSpeedEngine, folder: Path, tag: str) -> None:
    """Restore an engine of the same layout from the files in folder/tag, bit by bit. A collective call.

    Raises:
        RuntimeError: DeepSpeed found nothing to load.
    """
    path, _ = engine.load_checkpoint(str(folder), tag=tag, load_module_strict=False)
    if path is None:
        raise RuntimeError(f"DeepSpeed found nothing to load in {folder / tag}")


class _Taken(CheckpointEngine):
    """In place of DeepSpeed's writer: keeps a copy of each content under its file's name."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, Any] = {}

    def create(self, info: CheckpointCommitInfo) -> None:
        pass

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        # cloned: a view would be written with the whole buffer that it looks into, and the next step changes it
        self.files[Path(path).name] = clone_tensors_for_torch_save(state_dict, torch.device("cpu"))

    def load(self, path: str, map_location: Any = None) -> None:
        raise NotImplementedError("this engine only takes")

    def commit(self, info: CheckpointCommitInfo) -> bool:
        return True
