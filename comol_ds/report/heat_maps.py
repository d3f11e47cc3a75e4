"""Pictures of experts in columns: layers in rows, or tasks in rows."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from comol_ds.report.modules import Group, shorten
from comol_ds.report.read import Record, Run, Tasks
from comol_ds.report.style import (
    DIVERGING,
    MAX_GROUPS,
    SEQUENTIAL,
    WIDTH,
    color_bar,
    color_map,
    grid,
    label_ticks,
    title_of,
    write_cells,
)
from comol_ds.report.values import evenly_spaced, preference

_CELL = 0.24  # inches that a cell needs for a number in it
_GATE_LABEL = "mean gate / uniform share (1/E)"


def gate_range(gates: Sequence[np.ndarray]) -> int:
    """k such that colors from 2^-k to 2^k uniform shares tell 98 % of the gates [L, E] apart; 1 to 4."""
    ratio = np.abs(np.concatenate([_log_shares(gate).ravel() for gate in gates]))
    return int(np.clip(np.ceil(np.nanquantile(ratio, 0.98)), 1, 4)) if not np.isnan(ratio).all() else 1


def gate_panels(record: Record, groups: Sequence[Group], span: int) -> Figure:
    """Mean gate of one line, layer x expert, one panel per kind of module; numbers are percent where there is room."""
    shown = groups[:MAX_GROUPS]
    figure, axes, size = _layer_grid(shown, record.mean_gate.shape[1])
    for panel, group in zip(axes, shown, strict=True):
        gate = record.mean_gate[list(group.rows)]
        image = _gate_panel(panel, group, gate, size, span)
        panel.set_title(title_of(group))
        if _has_room(gate.shape, size):
            write_cells(panel, _percent(gate), _log_shares(gate) < 0.2 * span)
    _gate_bar(figure, image, axes, span)
    return figure


def gate_panels_over_training(run: Run, groups: Sequence[Group], span: int, wanted: int = 5) -> Figure:
    """Mean gate at some steps: a row of panels per step, a column per kind of module."""
    records = [run.main[position] for position in evenly_spaced(len(run.main), wanted)]
    shown = groups[:MAX_GROUPS]
    deepest = max(len(group.rows) for group in shown)
    width = (WIDTH - 1.2) / max(len(shown), 4)
    size = (width, float(np.clip(0.12 * deepest, 0.7, 1.9)))
    height = len(records) * (size[1] + 0.12) + 0.7
    figure = Figure(figsize=(max(width * len(shown) + 1.2, 4.5), height), layout="constrained")
    axes = figure.subplots(len(records), len(shown), squeeze=False)
    for row, record in enumerate(records):
        for column, group in enumerate(shown):
            panel = axes[row, column]
            image = _gate_panel(panel, group, record.mean_gate[list(group.rows)], size, span)
            if row == 0:
                panel.set_title(shorten(group.title, int(width * 12)))
            if row < len(records) - 1:
                panel.set_xticklabels([])
                panel.set_xlabel("")
            panel.set_ylabel(f"step {record.step}\nlayer" if column == 0 else "")
    _gate_bar(figure, image, axes.ravel().tolist(), span)
    return figure


def difference_panels(first: np.ndarray, second: np.ndarray, groups: Sequence[Group]) -> Figure:
    """Second minus first mean gate [L, E] in uniform shares, one panel per kind of module."""
    shown = groups[:MAX_GROUPS]
    figure, axes, size = _layer_grid(shown, first.shape[1])
    values = (second - first) * first.shape[1]
    span = _symmetric(values)
    for panel, group in zip(axes, shown, strict=True):
        rows = list(group.rows)
        image = _layer_panel(panel, group, values[rows], size, DIVERGING, (-span, span))
        panel.set_title(title_of(group))
        if _has_room((len(rows), first.shape[1]), size):
            text = np.vectorize("{:+.0f}".format, otypes=[str])(np.rint(100 * (second - first)[rows]) + 0.0)
            write_cells(panel, text, np.abs(values[rows]) > 0.75 * span)
    color_bar(figure, image, axes, "change of mean gate,\nin uniform shares (1/E)")
    return figure


def task_panels(tasks: Tasks, layers: Sequence[str], rows: Sequence[int], titles: Sequence[str]) -> Figure:
    """Task x expert for some layers: by how much a task's mean gate exceeds the layer's, in uniform shares.

    Experts stand beside those that prefer the same task. Numbers are the task's mean gate in percent.
    """
    experts = tasks.mean_gate.shape[-1]
    columns = 3 if experts <= 10 else 2 if experts <= 20 else 1
    size = (min((WIDTH - 1.0) / columns, max(experts * 0.42, 1.2) + 0.9), 0.22 * len(tasks.names) + 0.1)
    figure, axes = grid(len(rows), columns, size)
    prefers = preference(tasks.tokens, tasks.mean_gate)
    span = _symmetric(prefers[:, list(rows)])
    for position, (panel, row) in enumerate(zip(axes, rows, strict=True)):
        order = _by_favorite(prefers[:, row])
        shown = prefers[:, row, order]
        image = panel.imshow(
            shown, aspect="auto", cmap=color_map(DIVERGING), vmin=-span, vmax=span, interpolation="nearest"
        )
        label_ticks(panel.xaxis, [str(expert) for expert in order], size[0] - 0.9, 0.17)
        names = [shorten(name, 18) for name in tasks.names]
        panel.set_yticks(range(len(names)), names if position % columns == 0 else [""] * len(names))
        panel.set_title(f"{shorten(layers[row], 44)}\n{titles[position]}")
        if position >= len(rows) - columns:
            panel.set_xlabel("expert")
        if (size[0] - 0.9) / experts >= 0.2:
            text = _percent(tasks.mean_gate[:, row, order])
            write_cells(panel, text, np.abs(shown) > 0.75 * span)
    color_bar(figure, image, axes, "task's mean gate - layer's,\nin uniform shares (1/E)")
    return figure


def _layer_grid(groups: Sequence[Group], experts: int) -> tuple[Figure, list[Axes], tuple[float, float]]:
    deepest = max(len(group.rows) for group in groups)
    columns = min(len(groups), max(4, int((WIDTH - 1.0) / (experts * _CELL + 0.4))))
    width = float(np.clip(experts * 0.3, 1.0, (WIDTH - 1.0) / columns - 0.4))
    size = (width, float(np.clip(deepest * 0.2, 0.3, 4.4)))
    figure, axes = grid(len(groups), columns, (width + 0.4, size[1]))
    for panel in axes[::columns]:
        panel.set_ylabel("layer")
    return figure, axes, size


def _gate_panel(panel: Axes, group: Group, gate: np.ndarray, size: tuple[float, float], span: int) -> AxesImage:
    """Colors from 2^-span uniform shares to 2^span, or to E where that is less: no gate can be larger."""
    low, high = -span, min(span, np.log2(max(gate.shape[-1], 2)))
    return _layer_panel(panel, group, _log_shares(gate), size, SEQUENTIAL, (low, high))


def _layer_panel(
    panel: Axes, group: Group, values: np.ndarray, size: tuple[float, float], colors: str, limits: tuple[float, float]
) -> AxesImage:
    cmap = color_map(colors)
    image = panel.imshow(values, aspect="auto", cmap=cmap, vmin=limits[0], vmax=limits[1], interpolation="nearest")
    label_ticks(panel.xaxis, [str(expert) for expert in range(values.shape[1])], size[0])
    label_ticks(panel.yaxis, group.labels, size[1], 0.13)
    panel.set_xlabel("expert")
    return image


def _gate_bar(figure: Figure, image, axes: list[Axes], span: int) -> None:
    bar = color_bar(figure, image, axes, _GATE_LABEL)
    ticks = range(-span, int(image.get_clim()[1]) + 1)
    bar.set_ticks(ticks, labels=[f"1/{2**-tick}" if tick < 0 else str(2**tick) for tick in ticks])


def _log_shares(gate: np.ndarray) -> np.ndarray:
    """log2 of gates in uniform shares; an expert that got nothing counts as 2^-20."""
    return np.log2(np.maximum(gate * gate.shape[-1], 2.0**-20))


def _symmetric(values: np.ndarray) -> float:
    """Half the range of colors around zero: 98 % of the values lie inside."""
    return max(float(np.nanquantile(np.abs(values), 0.98)), 0.05) if not np.isnan(values).all() else 1.0


def _by_favorite(prefers: np.ndarray) -> np.ndarray:
    """Order of experts: by the task that prefers each most, then by how much. prefers: [T, E]."""
    return np.lexsort((-prefers.max(0), prefers.argmax(0)))


def _has_room(cells: tuple[int, int], inches: tuple[float, float]) -> bool:
    return inches[0] / cells[1] >= _CELL and inches[1] / cells[0] >= 0.14


def _percent(gate: np.ndarray) -> np.ndarray:
    return np.vectorize("{:.0f}".format, otypes=[str])(100 * gate)
