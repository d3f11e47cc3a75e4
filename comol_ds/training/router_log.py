"""Where router statistics go while a run trains: router_load.jsonl, curves and a heat map, and alarms."""

from statistics import mean
from typing import Any

import matplotlib
import numpy as np

from comol_ds.parallel.monitor import MonitorMaster, write_image
from comol_ds.router_load.counting import TRAIN
from comol_ds.router_load.statistics import as_record
from comol_ds.training.log_files import append_json_line
from comol_ds.training.plan import RunPlan
from comol_ds.training.router_alarms import RouterAlarms
from comol_ds.training.router_load import RouterLoad

_CELL = 8  # pixels of one expert of one layer


class RouterLog:
    """Writes what the routers did since the last line. Every rank counts, rank 0 writes.

    Args:
        plan: the run.
        router_load: what is counted.
        monitor: curves and pictures.
    """

    def __init__(self, plan: RunPlan, router_load: RouterLoad, monitor: MonitorMaster) -> None:
        settings = plan.config.router
        self._writes = plan.world.rank == 0
        self._file = plan.folder.router_load
        self._load = router_load
        self._monitor = monitor
        self._every = settings.router_load_steps or plan.config.run.logging_steps
        self._alarms = RouterAlarms(settings.router_alarm_steps)

    def is_due(self, step: int, last: int) -> bool:
        """Whether a line is written after this step; the step is then counted with detail."""
        return step % self._every == 0 or step == last

    def write(self, step: int, split: str = TRAIN) -> list[str]:
        """Write one line, if something was counted. A collective call.

        Returns:
            on rank 0, what the console is to say.
        """
        statistics = self._load.pop(split)
        if not self._writes or statistics is None:
            return []
        record = as_record(statistics, step, split)
        append_json_line(self._file, record)
        events = [(f"router_{split}/{name}", value, step) for name, value in curves(record["layers"]).items()]
        self._monitor.write_events(events)
        if split != TRAIN:
            return []
        write_image(self._monitor, "router_train/mean_gate", heat_map(record["layers"]), step)
        return self._alarms.check(record)


def curves(layers: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Few numbers about many layers: means over layers, the worst layer, the mean entropy per kind of Linear."""
    drawn: dict[str, float] = {}
    for name, worst in (("entropy", min), ("effective_experts", min), ("cv", max)):
        values = [found[name] for found in layers.values()]
        drawn |= {name: mean(values), f"{name}_{worst.__name__}": worst(values)}
    for name in ("update_ratio", "core_cosine"):
        values = [found[name] for found in layers.values() if found[name] is not None]
        drawn |= {name: mean(values)} if values else {}
    drawn["dead_experts"] = sum(len(found["dead_experts"]) for found in layers.values())
    kinds: dict[str, list[float]] = {}
    for layer, found in layers.items():
        kinds.setdefault(layer.rpartition(".")[2], []).append(found["entropy"])
    return drawn | {f"entropy/{kind}": mean(values) for kind, values in kinds.items()}


def heat_map(layers: dict[str, dict[str, Any]]) -> np.ndarray:
    """[rows, columns, 3] uint8: a row per layer in the model's order, a column per expert; 0 is dark, twice an equal
    share and more is bright."""
    gates = np.array([found["mean_gate"] for found in layers.values()])  # L E
    colors = matplotlib.colormaps["viridis"](np.clip(gates * gates.shape[1] / 2, 0, 1), bytes=True)[..., :3]
    return colors.repeat(_CELL, axis=0).repeat(_CELL, axis=1)
