"""From one row's counts to a micro-batch: what activations take in which mode of checkpointing, at the worst moment."""

from collections.abc import Sequence
from dataclasses import dataclass

from comol_ds.config import ModelSettings
from comol_ds.parallel.activations import MIN_OFFLOADED_BYTES
from comol_ds.planner.activations import Part, Profile
from comol_ds.planner.request import Request


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch on one rank.

    Attributes:
        layers: what the decoder layers keep for backward on the device.
        ends: what final norm, head and loss keep, most of it the logits.
        shared: masks and position tables.
        working: what is needed beside all this at the worst moment.
        host: what is kept in host memory.
    """

    layers: int
    ends: int
    shared: int
    working: int
    host: int

    @property
    def kept(self) -> int:
        """What is on the device between the passes."""
        return self.layers + self.ends + self.shared


def activations(profile: Profile, request: Request, settings: ModelSettings | None = None) -> Activations:
    """Memory of the passes. ``settings``: other settings of checkpointing than the request's, to compare."""
    settings, rows = settings or request.config.model, request.batches.micro_batch
    every = settings.checkpointed_every
    passes = profile.recomputed if every else profile.plain
    kept, host, working = [], 0, []
    for index, part in enumerate(profile.parts(every)):
        on_device, on_host, returned = _kept(part, rows, settings, bool(every) and index % every == 0, request)
        kept.append(on_device)
        host += on_host
        working.append(part.working * rows + returned)
    ends, shared = passes.ends, passes.shared * rows
    highest = max(sum(kept) + ends.working * rows, _highest_backward(kept, working) + ends.left * rows)
    ends_kept = ends.kept * rows
    return Activations(sum(kept), ends_kept, shared, max(0, highest - sum(kept) - ends_kept), host)


def _highest_backward(kept: Sequence[int], working: Sequence[int]) -> int:
    """Backward goes from the last layer to the first, freeing what each kept."""
    highest = alive = 0
    for own, needed in zip(kept, working, strict=True):
        alive += own
        highest = max(highest, alive + needed)
    return highest


def _kept(part: Part, rows: int, settings: ModelSettings, recomputed: bool, request: Request) -> tuple[int, int, int]:
    """(on the device, on the host, brought back in the layer's backward pass) bytes."""
    whole = part.kept * rows
    if recomputed and settings.partition_activations:
        part_of_rank = whole // request.grid.tensor_parallel
        return (0, part_of_rank, whole) if settings.activation_offload == "cpu" else (part_of_rank, 0, whole)
    if settings.activation_offload == "none":
        return whole, 0, 0
    small = sum(size * rows for size in part.saved if size * rows < MIN_OFFLOADED_BYTES)
    copies = sum(size * rows for size in part.saved_views if size * rows >= MIN_OFFLOADED_BYTES)
    return small, copies, copies
