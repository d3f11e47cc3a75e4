"""What the report says of one run, or of several beside each other: sections of pictures, tables and sentences."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from comol_ds.report import curves, heat_maps
from comol_ds.report.modules import Group, group_layers
from comol_ds.report.page import Section, definitions, folded, heading, note, paragraph, picture, table
from comol_ds.report.read import Run
from comol_ds.report.style import MAX_GROUPS, png
from comol_ds.report.values import (
    COLLAPSED,
    entropy_bits,
    information_limit,
    largest,
    nan_mean,
    task_distances,
)

_SHOWN_LAYERS = 6  # layers whose tasks are drawn
_SHOWN_ROWS = 20  # rows of a table that is not folded
_MEANINGS = (
    ("mean gate", "how much of a token's update comes from the expert, averaged over the valid tokens; sums to 1 over a"
     " layer's experts. In uniform shares: multiplied by E, so that 1 is what even routing gives."),
    ("argmax share", "share of tokens whose largest gate is the expert's."),
    ("share above half", "share of tokens that give the expert more than half of their gate."),
    ("gate entropy / log E", "how undecided the router is about single tokens, averaged over them; 1: every token uses"
     " all experts alike, 0: every token uses one."),
    ("effective experts", "exp(entropy of the mean gate), 1 to E: how many experts the layer uses over all tokens."),
    ("cv", "standard deviation of the mean gate over the experts, divided by their mean; 0 is balanced."),
    ("max/min", "largest mean gate divided by the smallest."),
    ("||s h M Bᵀ|| / ||W x||", "size of the adapter's update relative to the frozen layer's output, each as the root of"
     " the sum of squares over tokens."),
    ("mean cosine of cores", "mean pairwise cosine of the layer's expert cores; 1: the experts are alike."),
    ("dead experts", "experts with a mean gate below 1 %, or below half an even share where that is less."),
    ("collapsed", f"one expert has a mean gate above {COLLAPSED}."),
    ("I(task; expert)", "mutual information in bits: what the expert tells about the task when a token goes to an"
     " expert with its task's mean gate; tasks weigh as their tokens do. 0: all tasks route alike."),
    ("I / limit", "the same divided by the most it can be, min(H(task), log2 E); 1: the expert gives the task away, or"
     " the task uses all of the experts' capacity to tell."),
    ("distance of tasks", "total variation between two tasks' mean gates: the share of one task's tokens that would"
     " have to change expert to be routed as the other's; averaged over layers."),
)  # fmt: skip


@dataclass(frozen=True)
class Told:
    """A run with what the report calls it.

    Attributes:
        name: For people.
        prefix: Of its pictures' file names.
    """

    run: Run
    name: str
    prefix: str
    groups: list[Group]

    @classmethod
    def of(cls, run: Run, name: str, prefix: str) -> "Told":
        return cls(run, name, prefix, group_layers(run.layers))


class Pictures:
    """PNGs by file name, in the order they were drawn."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def add(self, name: str, figure: Figure, caption: str) -> str:
        """Draw it; returns its HTML."""
        self.files[f"{name}.png"] = png(figure)
        return picture(self.files[f"{name}.png"], round(100 * figure.get_figwidth()), caption)


def summary(runs: Sequence[Told]) -> Section:
    """One row per run, and what to know before reading on."""
    rows = []
    for told in runs:
        run, last = told.run, told.run.last
        tasks = run.with_tasks
        rows.append((
            told.name, last.step, last.split, len(run.layers), run.num_experts, last.tokens,
            float(nan_mean(last.scalars["entropy"])), float(nan_mean(last.scalars["effective_experts"])),
            sum(map(len, last.dead)), int((largest(last.mean_gate) > COLLAPSED).sum()),
            float(nan_mean(tasks.information) / _limit(told)) if tasks else float("nan"),
        ))  # fmt: skip
    heads = (
        "run", "last step", "split", "layers", "experts", "tokens in last line", "entropy / log E", "effective experts",
        "dead experts", "collapsed layers", "I(task; expert) / limit",
    )  # fmt: skip
    html = table(heads, rows) + paragraph("Entropy, effective experts and information are means over layers.")
    for told in runs:
        html += "".join(map(note, told.run.notes))
        if len(told.groups) > MAX_GROUPS:
            html += note(f"{told.name} adapts {len(told.groups)} kinds of module; pictures show the first {MAX_GROUPS}")
        if np.isnan(told.run.last.mean_gate).any():
            html += note(f"{told.name}: some mean gates are not finite; they are gray in the pictures")
    return Section("summary", "Summary", html)


def mean_gates(runs: Sequence[Told], pictures: Pictures) -> Section:
    span = heat_maps.gate_range([told.run.last.mean_gate for told in runs])

    def one(told: Told) -> str:
        last = told.run.last
        html = pictures.add(
            f"{told.prefix}mean_gate",
            heat_maps.gate_panels(last, told.groups, span),
            f"Mean gate at step {last.step} ({last.split}): a row per layer, a column per expert, a panel per kind of"
            " module. Green: an even share; yellow: preferred; dark: avoided. Numbers,"
            " where there is room, are percent.",
        )
        if len(told.run.main) == 1:
            return html + paragraph("Only one line was logged, so there is no picture over training.")
        return html + pictures.add(
            f"{told.prefix}mean_gate_training",
            heat_maps.gate_panels_over_training(told.run, told.groups, span),
            "The same at some steps over training.",
        )

    intro = "Expert numbers mean something within a layer only: expert 3 of one layer has nothing to do with expert 3"
    return Section("gates", "Mean gate", paragraph(f"{intro} of another.") + _per_run(runs, one))


def tasks(runs: Sequence[Told], pictures: Pictures) -> Section:
    return Section("tasks", "Tasks", _per_run(runs, lambda told: _tasks_of(told, pictures)))


def _tasks_of(told: Told, pictures: Pictures) -> str:
    record = told.run.with_tasks
    if record is None:
        return paragraph("No tasks: the records of the data have no task label, or no line was logged with them.")
    names, info, limit = record.tasks.names, record.information, _limit(told)
    if np.isnan(limit):
        return paragraph(f"Nothing to tell apart: {told.run.num_experts} experts, tasks {', '.join(names)}.")
    html = paragraph(
        f"Step {record.step}, {record.split} split, {len(names)} tasks: {', '.join(names)}. A layer can tell"
        f" {limit:.2f} bits at most: H(task) is {entropy_bits(record.tasks.tokens):.2f}, log2 E"
        f" {np.log2(told.run.num_experts):.2f}."
    )
    best = np.argsort(-np.nan_to_num(info), kind="stable")[:_SHOWN_LAYERS].tolist()
    titles = [f"{info[row]:.2f} bits, {info[row] / limit:.0%} of the possible" for row in best]
    html += pictures.add(
        f"{told.prefix}tasks",
        heat_maps.task_panels(record.tasks, told.run.layers, best, titles),
        "The layers that separate tasks best. Red: the task uses the expert more than the layer does over all tasks;"
        " blue: less. Experts are ordered by the task that prefers them; numbers, where there is room, are the task's"
        " mean gate in percent.",
    )
    html += pictures.add(
        f"{told.prefix}task_information",
        curves.information(told.run, told.groups),
        "How well experts separate tasks, and which tasks are routed alike: over all layers, a distance of 0 means the"
        " same experts, 1 means none in common.",
    )
    return html + _task_table(told)


def depth_and_training(runs: Sequence[Told], pictures: Pictures) -> Section:
    def one(told: Told) -> str:
        html, figure = "", curves.over_depth(told.run.last, told.groups)
        if figure is not None:
            html += pictures.add(f"{told.prefix}depth", figure, f"Over depth, at step {told.run.last.step}.")
        if any(group.depths is None for group in told.groups):
            html += paragraph("Layers without an index in their name are in the other pictures and in the table.")
        return html + pictures.add(
            f"{told.prefix}training",
            curves.over_training(told.run, told.groups),
            "Over training: means over the layers of a kind, points for training, crosses for validation.",
        )

    return Section("depth", "Depth and training", _per_run(runs, one))


def trouble(runs: Sequence[Told]) -> Section:
    def one(told: Told) -> str:
        last, run = told.run.last, told.run
        top = largest(last.mean_gate)
        collapsed = [row for row in np.argsort(-np.nan_to_num(top), kind="stable").tolist() if top[row] > COLLAPSED]
        dead = sorted((row for row in range(len(run.layers)) if last.dead[row]), key=lambda row: -len(last.dead[row]))
        html = ""
        if collapsed:
            rows = [(run.layers[row], int(last.mean_gate[row].argmax()), float(top[row])) for row in collapsed]
            html += heading(f"Collapsed layers: {len(rows)}") + _long_table(("layer", "expert", "mean gate"), rows)
        if dead:
            rows = [
                (run.layers[row], len(last.dead[row]), float(last.mean_gate[row].min()), _list(last.dead[row]))
                for row in dead
            ]
            title = f"Layers with dead experts: {len(rows)}, {sum(map(len, last.dead))} experts in all"
            html += heading(title) + _long_table(("layer", "dead", "smallest mean gate", "experts"), rows)
        if not html:
            return paragraph(f"None at step {last.step}: no dead expert, no collapsed layer.")
        remedy = "A load balance loss, --router_aux_loss_coef of launch/train.py, keeps experts in use."
        return paragraph(f"At step {last.step} ({last.split}). {remedy}") + html

    return Section("trouble", "Dead and collapsed", _per_run(runs, one))


def numbers(runs: Sequence[Told]) -> Section:
    heads = (
        "layer", "entropy / log E", "effective experts", "cv", "max/min", "largest mean gate", "its expert",
        "largest argmax share", "largest share above half", "update / base", "cosine of cores", "dead",
        "I(task; expert), bits", "I / limit",
    )  # fmt: skip

    def one(told: Told) -> str:
        run, last = told.run, told.run.last
        missing = np.full(len(run.layers), np.nan)
        info = run.with_tasks.information if run.with_tasks else missing
        columns = [last.scalars[key] for key in ("entropy", "effective_experts", "cv", "max_min_ratio")]
        gate, argmax, half = (last.experts[key].max(-1) for key in ("mean_gate", "argmax_share", "share_above_half"))
        columns += [gate, [int(row.argmax()) for row in last.mean_gate], argmax, half]
        columns += [last.scalars["update_ratio"], last.scalars["core_cosine"], [len(dead) for dead in last.dead]]
        columns += [info, info / _limit(told) if run.with_tasks else missing]
        rows = zip(run.layers, *(c if isinstance(c, list) else c.tolist() for c in columns), strict=True)
        return folded(f"{len(run.layers)} layers at step {last.step} ({last.split})", table(heads, rows, sortable=True))

    return Section("layers", "All layers", _per_run(runs, one))


def meanings() -> Section:
    return Section("meanings", "What the quantities mean", definitions(_MEANINGS))


def _per_run(runs: Sequence[Told], one: Callable[[Told], str]) -> str:
    return "".join((heading(told.name) if len(runs) > 1 else "") + one(told) for told in runs)


def _limit(told: Told) -> float:
    """Of I(task; expert) in bits; NaN where nothing can be told, with one task or one expert."""
    return information_limit(told.run.with_tasks.tasks.tokens, told.run.num_experts) or float("nan")


def _task_table(told: Told) -> str:
    record = told.run.with_tasks
    kept, count = record.tasks, len(record.tasks.names)
    apart = task_distances(kept.mean_gate).sum(-1) / max(count - 1, 1)
    means = [nan_mean(kept.scalars[key], axis=-1).tolist() for key in ("entropy", "effective_experts", "update_ratio")]
    heads = ("task", "tokens", "entropy / log E", "effective experts", "update / base", "mean distance to other tasks")
    rows = zip(kept.names, kept.tokens.astype(int).tolist(), *means, apart.tolist(), strict=True)
    return table(heads, rows) + paragraph("Means over layers.")


def _long_table(heads: Sequence[str], rows: list[tuple]) -> str:
    """Its first rows, the others folded."""
    html = table(heads, rows[:_SHOWN_ROWS])
    rest = rows[_SHOWN_ROWS:]
    return html + folded(f"{len(rest)} more", table(heads, rest)) if rest else html


def _list(experts: Sequence[int]) -> str:
    return ", ".join(map(str, experts))
