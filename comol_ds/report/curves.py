"""Pictures over depth and over training."""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from comol_ds.report.modules import Group, shorten
from comol_ds.report.read import Record, Run
from comol_ds.report.style import (
    COLORS,
    MAX_GROUPS,
    SEQUENTIAL,
    WIDTH,
    color_map,
    grid,
    group_style,
    label_ticks,
    title_of,
    write_cells,
)
from comol_ds.report.values import evenly_spaced, nan_mean, task_distances

ENTROPY, EFFECTIVE, UPDATE, COSINE = "entropy", "effective_experts", "update_ratio", "core_cosine"
AXIS_LABELS = {
    ENTROPY: "gate entropy / log E",
    EFFECTIVE: "effective experts",
    UPDATE: "||s h M Bᵀ|| / ||W x||",
    COSINE: "mean cosine of cores",
}
Values = Callable[[Record], np.ndarray]


def over_depth(record: Record, groups: Sequence[Group]) -> Figure | None:
    """Four quantities of one line over the layer's index, one curve per kind of module; None without depth."""
    indexed = [(position, group) for position, group in enumerate(groups[:MAX_GROUPS]) if group.depths]
    if all(len(group.rows) == 1 for _, group in indexed):
        return None
    figure = Figure(figsize=(WIDTH, 6.2), layout="constrained")
    for panel, (key, label) in zip(figure.subplots(2, 2).ravel(), AXIS_LABELS.items(), strict=True):
        for position, group in indexed:
            _depth_curve(panel, group, record.scalars[key], group_style(position))
        _finish(panel, "layer", label)
        _limit(panel, key, record.mean_gate.shape[1])
    _legend_above(figure, indexed)
    return figure


def over_training(run: Run, groups: Sequence[Group]) -> Figure:
    """Entropy, effective experts and update over steps, a curve per kind of module; entropy of layer x step."""
    shown = list(enumerate(groups[:MAX_GROUPS]))
    figure = Figure(figsize=(WIDTH, 6.2), layout="constrained")
    panels = figure.subplots(2, 2).ravel()
    for panel, key in zip(panels, (ENTROPY, EFFECTIVE, UPDATE), strict=False):
        for position, group in shown:
            style = group_style(position)
            _step_curve(panel, run.records["train"], group, key, style | {"marker": "."})
            _step_curve(panel, run.records["validation"], group, key, style | {"linestyle": "", "marker": "x"})
        _finish(panel, "step", AXIS_LABELS[key])
        _limit(panel, key, run.num_experts)
    _entropy_map(figure, panels[3], run, groups)
    _legend_above(figure, shown, validation=bool(run.records["validation"]))
    return figure


def information(run: Run, groups: Sequence[Group]) -> Figure:
    """I(task; expert) over depth and over training, and how far the tasks lie apart. The run has tasks."""
    record = run.with_tasks
    figure = Figure(figsize=(WIDTH, 4.3), layout="constrained")
    depth, steps, matrix = figure.subplots(1, 3, width_ratios=(1.25, 1, 1.15))
    shown = list(enumerate(groups[:MAX_GROUPS]))
    for position, group in shown:
        if group.depths:
            _depth_curve(depth, group, record.information, group_style(position))
        told = [one for one in run.records[record.split] if one.information is not None]
        means = [nan_mean(one.information[list(group.rows)]) for one in told]
        steps.plot([one.step for one in told], means, marker=".", **group_style(position))
    _finish(depth, "layer", "I(task; expert), bits")
    depth.set_title(f"over depth, step {record.step}")
    _finish(steps, "step", "I(task; expert), bits")
    steps.set_title(f"over training ({record.split}), mean over layers")
    for panel in (depth, steps):
        panel.set_ylim(bottom=0)
    _legend_above(figure, shown)
    _distance_matrix(figure, matrix, record)
    return figure


def paired(groups: Sequence[Group], ylabel: str, xlabel: str, draw: Callable[[Axes, Group], None]) -> Figure:
    """One panel per kind of module with a curve of each run, on a common scale. ``draw`` fills a panel."""
    shown = groups[:MAX_GROUPS]
    columns = len(shown) if len(shown) <= 5 else 4
    figure, panels = grid(len(shown), columns, ((WIDTH - 0.4) / columns if columns > 2 else 4.5, 1.9), margin=0.4)
    for position, (panel, group) in enumerate(zip(panels, shown, strict=True)):
        draw(panel, group)
        panel.set_title(title_of(group))
        _finish(panel, xlabel, ylabel if position % columns == 0 else "")
    lows, highs = zip(*(panel.get_ylim() for panel in panels), strict=True)
    for panel in panels:
        panel.set_ylim(min(lows), max(highs))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2)
    return figure


def pair_style(run: int) -> dict:
    """Curves of the first and of the second run."""
    return {"color": COLORS[run], "linestyle": ("-", "--")[run], "marker": "."}


def step_means(records: Sequence[Record], group: Group, key: str) -> tuple[list[int], list[float]]:
    """Steps, and a quantity's mean over a group's layers at each."""
    return [one.step for one in records], [float(nan_mean(one.scalars[key][list(group.rows)])) for one in records]


def _depth_curve(panel: Axes, group: Group, values: np.ndarray, style: dict) -> None:
    panel.plot(group.depths, values[list(group.rows)], marker="." if len(group.rows) < 30 else None, **style)


def _step_curve(panel: Axes, records: Sequence[Record], group: Group, key: str, style: dict) -> None:
    if records:
        panel.plot(*step_means(records, group, key), **style)


def _entropy_map(figure: Figure, panel: Axes, run: Run, groups: Sequence[Group]) -> None:
    """Layer x step, mean over the kinds of module."""
    depths = sorted({depth for group in groups for depth in group.depths or ()})
    if not depths or len(run.main) == 1:
        panel.set_axis_off()
        return
    rows = [[g.rows[g.depths.index(d)] for g in groups if g.depths and d in g.depths] for d in depths]
    records = [run.main[position] for position in evenly_spaced(len(run.main), 200)]
    values = np.array([[nan_mean(record.scalars[ENTROPY][row]) for record in records] for row in rows])
    image = panel.imshow(values, aspect="auto", cmap=color_map(SEQUENTIAL), interpolation="nearest")
    label_ticks(panel.yaxis, [str(depth) for depth in depths], 2.2)
    label_ticks(panel.xaxis, [str(record.step) for record in records], 4.5, 0.4)
    panel.set_xlabel("step")
    panel.set_ylabel("layer")
    figure.colorbar(image, ax=panel, label="gate entropy / log E, mean over modules", pad=0.01)


def _distance_matrix(figure: Figure, panel: Axes, record: Record) -> None:
    distances = task_distances(record.tasks.mean_gate)
    names = [shorten(name, 16) for name in record.tasks.names]
    image = panel.imshow(distances, cmap=color_map(SEQUENTIAL), vmin=0, interpolation="nearest")
    panel.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
    panel.set_yticks(range(len(names)), names)
    panel.set_title("distance of tasks, mean over layers")
    if len(names) <= 12:
        text = np.vectorize("{:.2f}".format, otypes=[str])(distances)
        write_cells(panel, text, distances <= 0.6 * distances.max())
    figure.colorbar(image, ax=panel, label="total variation, 0 to 1", pad=0.02, shrink=0.8)


def _finish(panel: Axes, xlabel: str, ylabel: str) -> None:
    panel.set_xlabel(xlabel)
    panel.set_ylabel(ylabel)
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.grid(color="0.9", linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    if len(places := {place for line in panel.lines for place in line.get_xdata()}) == 1:
        panel.set_xlim(min(places) - 1, min(places) + 1)
    if not any(np.isfinite(np.asarray(line.get_ydata(), float)).any() for line in panel.lines):
        panel.text(0.5, 0.5, "not recorded", transform=panel.transAxes, ha="center", color="0.5")


def _limit(panel: Axes, key: str, experts: int) -> None:
    """Fixed scales where the quantity has bounds, so that two reports can be compared by eye."""
    if key == ENTROPY:
        panel.set_ylim(-0.02, 1.02)
    elif key == EFFECTIVE:
        panel.set_ylim(1 - 0.02 * experts, experts * 1.02)


def _legend_above(figure: Figure, shown: Sequence[tuple[int, Group]], validation: bool = False) -> None:
    lines = [figure.axes[0].plot([], [], **group_style(position))[0] for position, _ in shown]
    labels = [title_of(group) for _, group in shown]
    if validation:
        lines.append(figure.axes[0].plot([], [], color="0.3", linestyle="", marker="x")[0])
        labels.append("validation")
    figure.legend(lines, labels, loc="outside upper left", ncols=min(len(labels), 8))
