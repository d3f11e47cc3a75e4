"""What the console says of routers that go wrong: experts nobody uses, and layers that use one expert only."""

from typing import Any

COLLAPSED_ABOVE = 0.9  # mean gate of the largest expert
NAMED = 5  # layers named per line; router_load.jsonl has them all


class RouterAlarms:
    """Watches one record after the other.

    Args:
        patience: how many records running show a trouble before it is reported, once; it is reported again if it comes
            back after having gone.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self._running: dict[tuple[str, str, int], int] = {}

    def check(self, record: dict[str, Any]) -> list[str]:
        """Lines to print after this record of router_load.jsonl, one per kind of trouble."""
        troubles = [
            *(("dead", layer, expert) for layer, found in record["layers"].items() for expert in found["dead_experts"]),
            *(
                ("collapsed", layer, found["mean_gate"].index(max(found["mean_gate"])))
                for layer, found in record["layers"].items()
                if len(found["mean_gate"]) > 1 and max(found["mean_gate"]) > COLLAPSED_ABOVE
            ),
        ]
        self._running = {trouble: self._running.get(trouble, 0) + 1 for trouble in troubles}
        due = [trouble for trouble, records in self._running.items() if records == self._patience]
        lines = f"in {self._patience} consecutive lines of router_load.jsonl"
        return [
            f"step {record['step']}: {what} {lines}, in {_named(due, kind)}; {remedy}"
            for kind, what, remedy in _KINDS
            if any(trouble[0] == kind for trouble in due)
        ]


_KINDS = (
    (
        "dead",
        "experts that almost no token uses (mean gate below 1 %)",
        "set or raise --router_aux_loss_coef (0.01, say), or lower --num_experts",
    ),
    (
        "collapsed",
        "routing has collapsed (one expert has more than 90 % of the mean gate)",
        "set or raise --router_aux_loss_coef (0.01, say) and --router_z_loss_coef (0.001, say), or lower"
        " --learning_rate",
    ),
)


def _named(due: list[tuple[str, str, int]], kind: str) -> str:
    """layer (experts 2, 5), layer (expert 1) and 3 more layers"""
    experts: dict[str, list[int]] = {}
    for found, layer, expert in due:
        if found == kind:
            experts.setdefault(layer, []).append(expert)
    names = [
        f"{layer} (expert{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))})"
        for layer, numbers in list(experts.items())[:NAMED]
    ]
    more = len(experts) - len(names)
    return ", ".join(names) + (f" and {more} more layer{'s' * (more > 1)}" if more else "")
