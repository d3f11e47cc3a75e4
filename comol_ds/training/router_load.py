"""Router statistics of a run: which tokens count, when, and the sum over the ranks."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from comol_ds.config import RouterSettings
from comol_ds.data.tokenization import IGNORED
from comol_ds.parallel.groups import mesh, sum_over_world
from comol_ds.parallel.tensor_parallel import base_kind
from comol_ds.router_load.counting import NOT_COUNTED, TRAIN, RouterCounts

MAX_TASKS = 64  # more labels than that are rather identifiers; the others count as one group


class RouterLoad:
    """Counts the routers of the model while `counting`, training and validation apart.

    Tensor-parallel ranks see the same tokens: the first of them counts, and the others add the parts of the updates'
    size that they alone hold.

    Args:
        model: adapted and sharded.
        settings: whether, and which tokens count.
        tasks: labels of the records; the first `MAX_TASKS` are counted separately.
    """

    def __init__(self, model: nn.Module, settings: RouterSettings | None = None, tasks: Sequence[str] = ()) -> None:
        self.settings = settings or RouterSettings()
        grid = mesh().grid
        self._counts = (
            RouterCounts(
                model,
                tasks=tasks[:MAX_TASKS],
                counts_replicated=grid.tp_rank == 0,
                holds_slice=lambda layer: base_kind(layer) == "column",
            )
            if self.settings.router_load
            else None
        )

    def counting(
        self, batch: dict[str, Any], device: torch.device, split: str = TRAIN, detail: bool = True
    ) -> AbstractContextManager[None]:
        """Count the forward pass inside, over this batch.

        Args:
            batch: as `comol_ds.data.collate` makes them.
            device: the model's.
            split: train or validation.
            detail: also measure the updates' size and the cores' cosine, which costs more.
        """
        if self._counts is None:
            return nullcontext()
        groups = torch.tensor([self._counts.group_of(task) for task in batch["tasks"]])
        owner = batch["record_index"].flatten()
        counts = routed_tokens(batch, self.settings).flatten()
        index = torch.where(counts, groups[owner.clamp(min=0)], NOT_COUNTED)
        return self._counts.counting(split, index.to(device), detail)

    def pop(self, split: str = TRAIN) -> dict[str, Any] | None:
        """The statistics over all ranks since the last call, see `RouterCounts.pop`; None if nothing was counted.

        A collective call: one sum for all layers.
        """
        return None if self._counts is None else self._counts.pop(split, sum_over_world)

    def close(self) -> None:
        """Remove the hooks."""
        if self._counts is not None:
            self._counts.close()


def valid_tokens(batch: dict[str, Any]) -> torch.Tensor:
    """[B, T] bool: True where a token of a record stands."""
    return batch["record_index"] >= 0


def routed_tokens(batch: dict[str, Any], settings: RouterSettings) -> torch.Tensor:
    """[B, T] bool: the tokens that count in router statistics and losses."""
    valid = valid_tokens(batch)
    return valid & (batch["labels"] != IGNORED) if settings.router_tokens == "completion" else valid
