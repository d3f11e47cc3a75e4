"""Numbers of the run while it trains: metrics.jsonl, TensorBoard or W&B, evaluations.jsonl."""

import time
from statistics import mean
from typing import Any

from comol_ds.evaluation.answers import Answer
from comol_ds.parallel.device import peak_memory_bytes
from comol_ds.parallel.groups import gather_objects
from comol_ds.parallel.monitor import MonitorMaster
from comol_ds.training.evaluation import Evaluation
from comol_ds.training.log_files import append_json_line
from comol_ds.training.plan import RunPlan
from comol_ds.training.step import StepResult


class Metrics:
    """Collects step results between log lines. Every rank counts, rank 0 writes."""

    def __init__(self, plan: RunPlan, monitor: MonitorMaster):
        self._writes = plan.world.rank == 0
        self._folder = plan.folder
        self._monitor = monitor
        self._start = self._last_log = time.monotonic()
        self._window: list[StepResult] = []

    def add(self, result: StepResult) -> None:
        """Take one step's sums."""
        self._window.append(result)

    def log(self, step: int, learning_rate: float) -> dict[str, Any]:
        """Write one line over the steps since the last one. A collective call.

        Returns:
            step, loss (mean over target tokens, nats), grad_norm (of the last step, before clipping), lr, tokens (valid
            ones in the window), tokens_per_second (all ranks), memory (the largest of memory_per_rank), memory_per_rank
            (each rank's peak so far, bytes), seconds (since start); of the losses on routers and cores that are in use,
            means over the steps.
        """
        now = time.monotonic()
        memory = gather_objects(peak_memory_bytes(), f"log step {step}")
        tokens = sum(result.tokens for result in self._window)
        line = {
            "step": step,
            "loss": sum(r.loss_sum for r in self._window) / sum(r.targets for r in self._window),
            "grad_norm": self._window[-1].grad_norm,
            "lr": learning_rate,
            "tokens": tokens,
            "tokens_per_second": tokens / (now - self._last_log),
            "memory": max(memory),
            "memory_per_rank": memory,
            "seconds": now - self._start,
        }
        router_losses = {
            name: mean(result.router_losses[name] for result in self._window) for name in self._window[-1].router_losses
        }
        line |= router_losses
        self._window, self._last_log = [], now
        if self._writes:
            append_json_line(self._folder.metrics, line)
            plotted = ("loss", "grad_norm", "lr", "tokens_per_second", "memory", *router_losses)
            self._monitor.write_events([(f"train/{name}", line[name], step) for name in plotted])
        return line

    def log_evaluation(self, step: int, evaluation: Evaluation, answers: list[Answer]) -> None:
        """Write one line per answer and one per evaluation; its time does not count in tokens_per_second."""
        self._last_log = time.monotonic()
        if not self._writes:
            return
        for answer in answers:
            append_json_line(self._folder.answers, {"step": step, **vars(answer)})
        append_json_line(self._folder.evaluations, {"step": step, "tasks": evaluation.as_json()})
        events = [(f"eval/loss/{task}", score.loss, step) for task, score in evaluation.tasks.items()]
        events += [
            (f"eval/exact_match/{task}", score.exact_match, step)
            for task, score in evaluation.tasks.items()
            if score.exact_match is not None
        ]
        self._monitor.write_events(events)
