"""Two runs beside each other: curves of both, and the change of mean gate in the layers that both have."""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes

from comol_ds.report import curves, heat_maps
from comol_ds.report.modules import Group, group_layers
from comol_ds.report.page import Section, heading, note, paragraph, table
from comol_ds.report.sections import Pictures, Told
from comol_ds.report.values import nan_mean

_SHOWN_ROWS = 15


def comparison(first: Told, second: Told, pictures: Pictures) -> Section:
    """The section; without common layers a sentence that says so."""
    return Section("comparison", "Comparison", _html(first, second, pictures))


def _html(first: Told, second: Told, pictures: Pictures) -> str:
    others = set(second.run.layers)
    common = [name for name in first.run.layers if name in others]
    if not common:
        return note(
            f"The runs have no layer in common ({first.name}: {first.run.layers[0]}, ...; {second.name}:"
            f" {second.run.layers[0]}, ...), so there is nothing to compare layer by layer."
        )
    html = ""
    if len(common) < max(len(first.run.layers), len(second.run.layers)):
        html += note(f"Compared are the {len(common)} layers that both runs have.")
    groups = group_layers(common)
    rows = [[told.run.layers.index(name) for name in common] for told in (first, second)]
    return html + _differences(first, second, common, groups, rows, pictures) + _curves(
        (first, second), groups, rows, pictures
    )  # fmt: skip


def _differences(first: Told, second: Told, common: list[str], groups, rows, pictures: Pictures) -> str:
    if first.run.num_experts != second.run.num_experts:
        return note(
            f"{first.name} has {first.run.num_experts} experts and {second.name} {second.run.num_experts}, so"
            " mean gates are not subtracted."
        )
    gates = [told.run.last.mean_gate[part] for told, part in zip((first, second), rows, strict=True)]
    html = paragraph(
        f"Mean gate of {second.name} (step {second.run.last.step}) minus that of {first.name} (step"
        f" {first.run.last.step}). Experts with the same number correspond only if both runs began with the same cores"
        " and router, so with the same seed or the same starting adapter."
    )
    html += pictures.add(
        "compare_mean_gate",
        heat_maps.difference_panels(*gates, groups),
        f"Red: {second.name} uses the expert more; blue: less. Numbers, where there is room, are percentage points.",
    )
    moved = np.abs(gates[1] - gates[0]).sum(-1) / 2
    order = np.argsort(-np.nan_to_num(moved), kind="stable")[:_SHOWN_ROWS].tolist()
    entropies = [told.run.last.scalars["entropy"][part] for told, part in zip((first, second), rows, strict=True)]
    heads = (
        "layer",
        "share of the gate that moved",
        f"entropy / log E, {first.name}",
        f"entropy / log E, {second.name}",
    )
    body = [(common[row], float(moved[row]), *(float(values[row]) for values in entropies)) for row in order]
    title = f"Layers that differ most; the mean over all is {nan_mean(moved):.3f}"
    return html + heading(title) + table(heads, body)


def _curves(runs: Sequence[Told], groups: list[Group], rows: list[list[int]], pictures: Pictures) -> str:
    html = ""
    label = curves.AXIS_LABELS[curves.ENTROPY]
    indexed = [group for group in groups if group.depths]
    if indexed:
        values = [told.run.last.scalars[curves.ENTROPY][part] for told, part in zip(runs, rows, strict=True)]
        figure = curves.paired(indexed, label, "layer", _over_depth(runs, values))
        html += pictures.add("compare_entropy_depth", figure, "Entropy over depth at the last step of both runs.")

    def over_training(panel: Axes, group: Group) -> None:
        for number, (told, part) in enumerate(zip(runs, rows, strict=True)):
            own = Group(group.title, tuple(part[row] for row in group.rows), group.labels, group.depths)
            points = curves.step_means(told.run.main, own, curves.ENTROPY)
            panel.plot(*points, label=told.name, **curves.pair_style(number))

    figure = curves.paired(groups, label, "step", over_training)
    html += pictures.add("compare_entropy_training", figure, "Entropy over training, mean over the layers of a kind.")
    records = [told.run.with_tasks for told in runs]
    if indexed and all(records):
        values = [record.information[part] for record, part in zip(records, rows, strict=True)]
        figure = curves.paired(indexed, "I(task; expert), bits", "layer", _over_depth(runs, values))
        html += pictures.add("compare_task_information", figure, "How well experts separate tasks, over depth.")
    return html


def _over_depth(runs: Sequence[Told], values: Sequence[np.ndarray]) -> Callable[[Axes, Group], None]:
    """Draws both runs' values of the common layers, each [L], over the index."""

    def draw(panel: Axes, group: Group) -> None:
        for number, (told, own) in enumerate(zip(runs, values, strict=True)):
            style = curves.pair_style(number) | ({} if len(group.rows) < 30 else {"marker": None})
            panel.plot(group.depths, own[list(group.rows)], label=told.name, **style)

    return draw
