"""Router statistics under transformers' Trainer."""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from comol_ds.router_load.counting import TRAIN, VALIDATION
from comol_ds.router_load.statistics import as_record
from comol_ds.router_load.tracking import RouterTracker


class RouterLoadCallback(TrainerCallback):
    """Writes `router_load.jsonl` to the Trainer's output folder: a line per log, and one per evaluation.

    Args:
        completion_only: count tokens with a label only.
    """

    def __init__(self, completion_only: bool = False) -> None:
        self._completion_only = completion_only
        self._tracker: RouterTracker | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        self._tracker = RouterTracker(model, completion_only=self._completion_only)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._write(args, state, TRAIN)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._write(args, state, VALIDATION)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._write(args, state, TRAIN)
        if self._tracker is not None:
            self._tracker.close()
            self._tracker = None

    def _write(self, args: TrainingArguments, state: TrainerState, split: str) -> None:
        """A collective call: Trainer makes these calls on every rank."""
        if self._tracker is None:
            return
        statistics = self._tracker.read(split, _sum_over_ranks)
        if statistics is not None and state.is_world_process_zero:
            folder = Path(args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "router_load.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(as_record(statistics, state.global_step, split)) + "\n")


def _sum_over_ranks(flat: torch.Tensor) -> None:
    if PartialState().num_processes > 1:
        flat.copy_(reduce(flat, reduction="sum"))
