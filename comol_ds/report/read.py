"""router_load.jsonl, version 1: from lines of JSON to arrays, with everything that is wrong told on one line.

T tasks, L layers, E experts. A line of a 70B-class run holds some 10^6 numbers, so per-task values are kept for the
last line of each split only.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np

from comol_ds.errors import UserError, one_line, shown
from comol_ds.report.values import mutual_information
from comol_ds.text_files import parse_json

FILE_NAME = "router_load.jsonl"
VERSION = 1
SPLITS = ("train", "validation")
_PER_EXPERT = ("mean_gate", "argmax_share", "share_above_half")
_PER_TASK = ("entropy", "effective_experts", "update_ratio")
_PER_LAYER = ("entropy", "effective_experts", "cv", "max_min_ratio", "update_ratio", "core_cosine")
_LONGEST_LINE = 128 << 20  # bytes, of which a run of 100 tasks, 560 layers and 64 experts needs 100 MB
_MOST = 1e50  # the largest ratio of two fp32 gates is below 1e46
_SEPARATE = "report runs of one adapter from separate files"
_OTHER_WRITER = "the file was written by another version of comol_ds, use the one that trained"


@dataclass(frozen=True)
class Tasks:
    """The values of one line that are kept apart per task; all are means over the task's tokens.

    Attributes:
        names: [T].
        tokens: [T] valid tokens.
        mean_gate: [T, L, E].
        scalars: entropy, effective_experts and update_ratio, each [T, L].
    """

    names: tuple[str, ...]
    tokens: np.ndarray
    mean_gate: np.ndarray
    scalars: dict[str, np.ndarray]


@dataclass(frozen=True)
class Record:
    """One line. NaN stands for null.

    Attributes:
        experts: mean_gate, argmax_share and share_above_half, each [L, E].
        scalars: entropy, effective_experts, cv, max_min_ratio, update_ratio and core_cosine, each [L].
        dead: Per layer, the experts that the writer counts as dead.
        information: [L] I(task; expert) in bits; None without tasks.
        tasks: None without tasks, and in lines before a split's last one with tasks.
    """

    step: int
    split: str
    tokens: int
    experts: dict[str, np.ndarray]
    scalars: dict[str, np.ndarray]
    dead: tuple[tuple[int, ...], ...]
    information: np.ndarray | None
    tasks: Tasks | None

    @property
    def mean_gate(self) -> np.ndarray:
        return self.experts["mean_gate"]


@dataclass
class Run:
    """A run's file. At least one split has a record; records are in the file's order."""

    path: Path
    layers: tuple[str, ...] = ()
    records: dict[str, list[Record]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    notes: list[str] = field(default_factory=list)

    @property
    def num_experts(self) -> int:
        return self.last.mean_gate.shape[1]

    @property
    def main(self) -> list[Record]:
        """The records of training, or those of validation in a run that has no others."""
        return self.records["train"] or self.records["validation"]

    @property
    def last(self) -> Record:
        return self.main[-1]

    @property
    def with_tasks(self) -> Record | None:
        """The last record with tasks, of validation if it has one: its tasks are read under final weights."""
        for split in ("validation", "train"):
            kept = [record for record in self.records[split] if record.tasks is not None]
            if kept:
                return kept[-1]
        return None


def read_run(path: Path) -> Run:
    """Read a run folder's router_load.jsonl, or such a file itself.

    Raises:
        UserError: no such file, nothing in it yet, another version, or a line that is not what the version says.
    """
    file = _find(path)
    run = Run(file)
    for number, line in _lines(file, run.notes):
        where = f"{file} line {number}"
        record, layers = _record(line, where)
        if not run.layers:
            run.layers, experts = layers, record.mean_gate.shape[1]
        if layers != run.layers:
            raise _invalid(where, _difference(layers, run.layers), _SEPARATE)
        if record.mean_gate.shape[1] != experts:
            raise _invalid(where, f"{record.mean_gate.shape[1]} experts, but {experts} in the lines before", _SEPARATE)
        _append(run.records[record.split], record)
    if not run.layers:
        raise UserError(f"{file} has no complete line yet; wait for the run's first --logging_steps, then try again")
    return run


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give a run's --output_dir or its {FILE_NAME}")
    if not (path / FILE_NAME).is_file():
        raise UserError(f"{path} has no {FILE_NAME}; give a run's --output_dir, one that has logged its first step")
    return path / FILE_NAME


def _lines(file: Path, notes: list[str]) -> Iterator[tuple[int, Any]]:
    """Parsed lines with their numbers. The last line may be half written: the run goes on, or was killed."""
    broken = None
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(iter(lambda: lines.readline(_LONGEST_LINE + 1), b""), start=1):
                if broken is not None:
                    raise UserError(f"{file} line {broken[0]}: not JSON ({broken[1]}); delete the line and try again")
                if len(line) > _LONGEST_LINE:
                    raise _invalid(f"{file} line {number}", f"longer than {_LONGEST_LINE >> 20} MiB")
                if not line.strip():
                    continue
                try:
                    yield number, parse_json(line)
                except ValueError as error:  # JSON and UTF-8 errors are both
                    broken = number, one_line(error, 80)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; check the file") from error
    if broken is not None:
        notes.append(f"line {broken[0]}, the last of {file}, is half written and was ignored")


def _invalid(where: str, fault: str, remedy: str = _OTHER_WRITER) -> UserError:
    """``fault`` may quote names of the file, which are of any length."""
    return UserError(f"{where}: {one_line(fault, 300)}; {remedy}")


def _record(line: Any, where: str) -> tuple[Record, tuple[str, ...]]:
    if not isinstance(line, dict):
        raise _invalid(where, "not an object", f"give the {FILE_NAME} of a run")
    version = line.get("version")
    if type(version) is not int or version != VERSION:
        has = f"version {shown(version)}" if "version" in line else "no version"
        raise _invalid(where, f"has {has}, this program reads version {VERSION}")
    step, split, tokens, layers = (line.get(name) for name in ("step", "split", "tokens", "layers"))
    if split not in SPLITS:
        raise _invalid(where, f"split is {shown(split)}, neither train nor validation")
    if not _is_count(step) or type(step) is not int or not isinstance(tokens, dict) or not _is_count(tokens.get("all")):
        raise _invalid(where, "step is no whole number or tokens has no number for all")
    if not isinstance(layers, dict) or not layers or not all(isinstance(layer, dict) for layer in layers.values()):
        raise _invalid(where, "layers is no object of at least one layer")
    if unwritable := next((name for name in (*layers, *tokens) if not _is_text(name)), None):
        raise _invalid(where, f"{shown(unwritable)} is no name of a layer or a task")
    experts = _experts(layers, where)
    tasks = _tasks(layers, tokens, experts, where)
    record = Record(
        step=step,
        split=split,
        tokens=int(tokens["all"]),
        experts={name: _numbers(layers, name, where, (experts,)) for name in _PER_EXPERT},
        scalars={name: _numbers(layers, name, where, ()) for name in _PER_LAYER},
        dead=tuple(_dead(name, layer, experts, where) for name, layer in layers.items()),
        information=None if tasks is None else mutual_information(tasks.tokens, tasks.mean_gate),
        tasks=tasks,
    )
    return record, tuple(layers)


def _experts(layers: dict[str, dict], where: str) -> int:
    """E, which all layers of a run share."""
    counts = {}
    for name, layer in layers.items():
        gate = layer.get("mean_gate")
        if not isinstance(gate, list) or not gate:
            raise _invalid(where, f"mean_gate of {name} is no list of numbers")
        counts.setdefault(len(gate), name)
    if len(counts) > 1:
        (one, a), (other, b) = list(counts.items())[:2]
        raise _invalid(where, f"{a} has {one} experts and {b} has {other}", "the report needs the same --num_experts")
    return next(iter(counts))


def _numbers(layers: dict[str, dict], key: str, where: str, shape: tuple[int, ...], of: str = "") -> np.ndarray:
    """[L, *shape] of what every layer has under ``key``; null becomes NaN."""
    values = [layer.get(key) for layer in layers.values()]
    array = _as_array(values)
    if array is not None and array.shape == (len(layers), *shape):
        return np.where(np.isfinite(array), array, np.nan)
    name = next((name for name, value in zip(layers, values, strict=True) if not _has_shape(value, shape)), "a layer")
    wanted = f"a list of {shape[0]} numbers, one per expert" if shape else "a number or null"
    raise _invalid(where, f"{key} of {name}{of} is not {wanted}")


def _as_array(values: Any) -> np.ndarray | None:
    """None if they are no lists of numbers, or hold a number that no statistic has."""
    try:
        array = np.array(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        return None
    is_ours = _are_numbers(values) and not (np.isfinite(array) & (np.abs(array) > _MOST)).any()
    return array if is_ours else None


def _are_numbers(values: Any) -> bool:
    """numpy would read "4" and true as numbers too."""
    return all(map(_are_numbers, values)) if isinstance(values, list) else type(values) in (int, float, NoneType)


def _is_count(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1 << 53  # not NaN either


def _is_text(name: str) -> bool:
    """A lone half of a UTF-16 pair can be written in JSON, and nowhere else."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def _has_shape(value: Any, shape: tuple[int, ...]) -> bool:
    array = _as_array(value)
    return array is not None and array.shape == shape


def _dead(name: str, layer: dict, experts: int, where: str) -> tuple[int, ...]:
    dead = layer.get("dead_experts")
    if not isinstance(dead, list) or not all(type(expert) is int and 0 <= expert < experts for expert in dead):
        raise _invalid(where, f"dead_experts of {name} is no list of numbers from 0 to {experts - 1}")
    return tuple(dead)


def _tasks(layers: dict[str, dict], tokens: dict[str, Any], experts: int, where: str) -> Tasks | None:
    """Tasks that have tokens; None if there are none. NaN where a task has no tokens in a layer."""
    per_layer = {name: layer.get("tasks") or {} for name, layer in layers.items()}
    for layer, tasks in per_layer.items():
        if not isinstance(tasks, dict) or not all(isinstance(values, dict) for values in tasks.values()):
            raise _invalid(where, f"tasks of {layer} is no object of objects")
    names = tuple({name: None for tasks in per_layer.values() for name in tasks})
    uncounted = [name for name in names if not _is_count(tokens.get(name))]
    if uncounted:
        raise _invalid(where, f"task {uncounted[0]} has no number in tokens")
    names = tuple(name for name in names if tokens[name] > 0)
    if not names:
        return None
    gates, scalars = [], {key: [] for key in _PER_TASK}
    for name in names:
        one = {layer: tasks.get(name, {"mean_gate": [None] * experts}) for layer, tasks in per_layer.items()}
        gates.append(_numbers(one, "mean_gate", where, (experts,), f", task {name},"))
        for key, rows in scalars.items():
            rows.append(_numbers(one, key, where, (), f", task {name},"))
    counts = np.array([tokens[name] for name in names], dtype=np.float64)
    return Tasks(names, counts, np.stack(gates), {key: np.stack(rows) for key, rows in scalars.items()})


def _append(records: list[Record], record: Record) -> None:
    """Keep the tasks of the last record that has any."""
    if record.tasks is not None:
        for position, earlier in enumerate(records):
            if earlier.tasks is not None:
                records[position] = replace(earlier, tasks=None)
    records.append(record)


def _difference(layers: tuple[str, ...], before: tuple[str, ...]) -> str:
    extra, missing = set(layers) - set(before), set(before) - set(layers)
    if extra:
        return f"layer {min(extra)} is not in the lines before"
    if missing:
        return f"layer {min(missing)} of the lines before is missing"
    return "layers are in another order than in the lines before"
