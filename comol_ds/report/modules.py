"""Adapted layers by name: which stand at the same place of successive decoder layers, and at which depth."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

_INDEX = re.compile(r"(?:^|(?<=\.))\d+(?=\.)")
WITHOUT_INDEX = "no layer index"


@dataclass(frozen=True)
class Group:
    """Layers of one kind, such as all q_proj, in order of depth.

    Attributes:
        title: The shortest end of the module path that no other group has.
        rows: Positions of the layers in the run's list of layers.
        labels: What stands beside each row: the layer's index, or its name where it has none.
        depths: The layers' indices; None for the group of names without one.
    """

    title: str
    rows: tuple[int, ...]
    labels: tuple[str, ...]
    depths: tuple[int, ...] | None


def group_layers(names: Sequence[str]) -> list[Group]:
    """Groups in order of their first layer. The first number in a module path is the layer's index.

    Names without a number come last, together in one group.
    """
    found: dict[str, list[tuple[int, int]]] = {}  # path with * for the index -> (depth, row)
    others = []
    for row, name in enumerate(names):
        index = _INDEX.search(name)
        if index is None:
            others.append(row)
            continue
        pattern = f"{name[: index.start()]}*{name[index.end() :]}"
        found.setdefault(pattern, []).append((int(index.group()), row))
    titles = _shortest_endings(list(found))
    groups = []
    for pattern, members in found.items():
        depths, rows = zip(*sorted(members), strict=True)
        groups.append(Group(titles[pattern], rows, tuple(str(depth) for depth in depths), depths))
    if others:
        groups.append(Group(WITHOUT_INDEX, tuple(others), tuple(names[row] for row in others), None))
    return groups


def _shortest_endings(patterns: list[str]) -> dict[str, str]:
    parts = {pattern: pattern.split(".") for pattern in patterns}
    endings = dict.fromkeys(patterns, 1)
    while True:
        titles = {pattern: ".".join(parts[pattern][-length:]) for pattern, length in endings.items()}
        uses = Counter(titles.values())
        shared = [pattern for pattern in patterns if uses[titles[pattern]] > 1]
        if not shared:
            return titles
        for pattern in shared:
            endings[pattern] += 1


def shorten(name: str, length: int) -> str:
    """A name without its middle, at most ``length`` characters long."""
    if len(name) <= length:
        return name
    head = (length - 1) // 3
    return f"{name[:head]}…{name[len(name) - (length - 1 - head) :]}"
