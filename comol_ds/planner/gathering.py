"""When ZeRO-3 gathers which weights, and how much of them exists at once.

Follows DeepSpeed 0.19's coordinator with a complete trace: a unit's weights are fetched before its pass, in one
collective per group of ranks; then the next ones in the trace are prefetched, up to stage3_prefetch_bucket_size
elements and stage3_max_live_parameters; after its pass a unit is released, unless one of the next
stage3_max_reuse_distance elements of the trace is its own. Modules without weights prefetch too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from comol_ds.planner.local_model import LocalParameter, Unit
from comol_ds.planner.request import Request
from comol_ds.planner.weights import gathered_over, persists


@dataclass(frozen=True)
class Collective:
    """One all-gather.

    Attributes:
        nbytes: of the gathered tensor.
        ranks: over how many ranks.
    """

    nbytes: int
    ranks: int


@dataclass(frozen=True)
class Gathering:
    """One forward and backward pass.

    Attributes:
        arriving: bytes of gathered weights at the worst moment between two passes of units, when collectives of several
            weights stand beside the weights that are copied out of them.
        computing: the same while units compute.
        collectives: in order.
    """

    arriving: int
    computing: int
    collectives: list[Collective]


def simulate(units: Sequence[Unit], request: Request) -> Gathering:
    """Go through one micro-batch of a later step; the first two have no complete trace.

    Args:
        units: in the order of the forward pass, then of the backward pass.
        request: the resolved run.
    """
    if request.stage < 3:
        return Gathering(0, 0, [])
    trace = [replace(unit, parameters=tuple(p for p in unit.parameters if not persists(p, request))) for unit in units]
    coordinator = _Coordinator(trace, request)
    for step in range(len(trace)):
        coordinator.fetch(step)
        coordinator.prefetch(step)
        coordinator.release(step)
    return Gathering(coordinator.arriving, coordinator.computing, coordinator.collectives)


class _Arrival:
    """Weights on their way in one buffer, which lives until the last of them has been asked for."""

    def __init__(self, parameters: Sequence[LocalParameter], nbytes: int) -> None:
        self.parameters, self.nbytes = parameters, nbytes
        self.expected = {parameter.name for parameter in parameters}
        self.is_copied = len(parameters) == 1  # a single weight arrives where it stays


class _Coordinator:
    def __init__(self, trace: Sequence[Unit], request: Request) -> None:
        self.trace, self._request, self._zero = trace, request, request.zero
        # frozen before trainable: the base is partitioned when it is loaded, the adapter later
        self._queue = [
            (step, parameter)
            for step, unit in enumerate(trace)
            for parameter in sorted(unit.parameters, key=lambda parameter: parameter.trainable)
        ]
        self._next = 0  # place in the queue
        self._seen_until: dict[str, int] = {}  # parameter -> last step whose use the queue has passed
        self._live: dict[str, LocalParameter] = {}  # gathered, or on their way
        self._arrivals: list[_Arrival] = []
        self.collectives: list[Collective] = []
        self.arriving = self.computing = 0

    def fetch(self, step: int) -> None:
        unit = self.trace[step]
        self._gather([parameter for parameter in unit.parameters if parameter.name not in self._live])
        names = {parameter.name for parameter in unit.parameters}
        for arrival in self._arrivals:
            if arrival.expected & names:
                arrival.is_copied = True
                arrival.expected -= names
        self.arriving = max(self.arriving, self._bytes())
        self._arrivals = [arrival for arrival in self._arrivals if arrival.expected]
        missing = {name for name in names if self._seen_until.get(name, -1) < step}
        while missing:
            missing.discard(self._pass_one())

    def prefetch(self, step: int) -> None:
        live = sum(parameter.numel for parameter in self._live.values())
        limit = min(self._zero.max_live_parameters - live, self._zero.prefetch_bucket_size)
        chosen: dict[str, LocalParameter] = {}
        while self._next < len(self._queue) and sum(p.numel for p in chosen.values()) < limit:
            _, parameter = self._queue[self._next]
            self._pass_one()
            if parameter.name not in self._live:
                chosen[parameter.name] = parameter
        self._gather(list(chosen.values()))
        self.computing = max(self.computing, self._bytes())

    def release(self, step: int) -> None:
        released, keep, passed = self.trace[step], set(), 0
        for unit in self.trace[step + 1 :]:
            if passed >= self._zero.max_reuse_distance:
                break
            # for a layer all modules are looked at with everything below them, else with what is their very own
            found = unit.within if released.is_layer else () if unit.is_layer else unit.parameters
            keep |= {parameter.name for parameter in found}
            passed += sum(parameter.numel for parameter in found)
        for parameter in released.parameters:
            if parameter.name not in keep and self._seen_until[parameter.name] <= step + 1:
                self._live.pop(parameter.name, None)

    def _pass_one(self) -> str:
        """Step over the first use in the queue; returns the parameter's name."""
        used_at, parameter = self._queue[self._next]
        self._next += 1
        self._seen_until[parameter.name] = max(self._seen_until.get(parameter.name, -1), used_at)
        return parameter.name

    def _gather(self, parameters: list[LocalParameter]) -> None:
        self._live |= {parameter.name: parameter for parameter in parameters}
        by_ranks: dict[int, list[LocalParameter]] = {}
        for parameter in parameters:
            by_ranks.setdefault(gathered_over(parameter, self._request), []).append(parameter)
        for ranks, group in by_ranks.items():
            if ranks > 1:
                nbytes = sum(parameter.nbytes for parameter in group)
                self.collectives.append(Collective(nbytes, ranks))
                self._arrivals.append(_Arrival(group, nbytes))

    def _bytes(self) -> int:
        """Gathered weights, and the buffers in which others are on their way or have come."""
        on_their_way = {p.name for arrival in self._arrivals if not arrival.is_copied for p in arrival.parameters}
        return sum(
            self._gathered_bytes(parameter) for parameter in self._live.values() if parameter.name not in on_their_way
        ) + sum(arrival.nbytes for arrival in self._arrivals if len(arrival.parameters) > 1)

    def _gathered_bytes(self, parameter: LocalParameter) -> int:
        """Over one rank nothing is gathered: the partition is the weight, unless it comes from the host."""
        alone = gathered_over(parameter, self._request) == 1 and self._request.offload_device("param") == "none"
        return 0 if alone else parameter.nbytes
