"""Router statistics for scripts of one's own: training loops, transformers' Trainer, inference and generation."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from comol_ds.adapters.comol_layer import ADAPTER
from comol_ds.router_load.counting import NOT_COUNTED, TRAIN, VALIDATION, RouterCounts, SumOverRanks

IGNORED = -100  # transformers' label of a token without a loss


class RouterTracker:
    """Counts every forward pass of a model, apart for training and evaluation mode; see `track_router_load`."""

    def __init__(
        self, model: nn.Module, adapter_name: str = ADAPTER, tasks: Sequence[str] = (), completion_only: bool = False
    ) -> None:
        self._counts = RouterCounts(model, adapter_name, tasks)
        self._completion_only = completion_only
        self._rows: list[str | None] | None = None
        self._armed = ExitStack()
        # generate() calls the base model and not the PeftModel around it
        self._base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._hooks = [
            self._base.register_forward_pre_hook(self._before, with_kwargs=True),
            self._base.register_forward_hook(self._after, always_call=True),
        ]

    def label_rows(self, tasks: Sequence[str | None]) -> None:
        """Name the task of every row of the next forward pass; one that was not declared counts as ``other``."""
        self._rows = list(tasks)

    def read(self, split: str = TRAIN, sum_over_ranks: SumOverRanks = lambda flat: None) -> dict[str, Any] | None:
        """The statistics of a split since they were last read, or None; see `RouterCounts.pop`.

        Args:
            split: "train" for passes in training mode, "validation" for those in evaluation mode.
            sum_over_ranks: adds up a tensor over all ranks, in place; then every rank must call.
        """
        return self._counts.pop(split, sum_over_ranks)

    def close(self) -> None:
        """Remove all hooks."""
        for hook in self._hooks:
            hook.remove()
        self._counts.close()

    def _before(self, model: nn.Module, args: tuple, inputs: dict[str, Any]) -> None:
        self._armed.close()
        split = TRAIN if model.training else VALIDATION
        self._armed.enter_context(self._counts.counting(split, self._index(args, inputs)))

    def _after(self, *_: Any) -> None:
        self._armed.close()
        self._rows = None

    def _index(self, args: tuple, inputs: dict[str, Any]) -> torch.Tensor:
        """[N]: each token's group, from the mask, labels and row labels of a call of the model."""
        tokens = inputs.get("input_ids", args[0] if args else None)
        if tokens is None:
            tokens = inputs["inputs_embeds"]
        rows, length = tokens.shape[:2]
        counted = torch.ones(rows, length, dtype=torch.bool, device=tokens.device)
        mask = inputs.get("attention_mask")
        if mask is not None and mask.dim() == 2:  # with a cache, the mask covers earlier tokens too
            counted &= mask[:, -length:].bool()
        if self._completion_only:
            labels = inputs.get("labels")
            if labels is None:
                raise ValueError("completion_only counts tokens with a label, and this call of the model has no labels")
            counted &= labels != IGNORED
        names = self._rows or [None] * rows
        if len(names) != rows:
            raise ValueError(f"label_rows named {len(names)} tasks for a batch of {rows} rows")
        groups = torch.tensor([self._counts.group_of(name) for name in names], device=tokens.device)
        return torch.where(counted, groups.unsqueeze(1), NOT_COUNTED).flatten()


@contextmanager
def track_router_load(
    model: nn.Module, adapter_name: str = ADAPTER, tasks: Sequence[str] = (), completion_only: bool = False
) -> Iterator[RouterTracker]:
    """Count what the routers of a CoMoL model do in the forward passes inside: training, evaluation, generation.

        with track_router_load(model) as load:
            model.generate(**prompts)
        print(load.read("validation")["layers"]["model.layers.0.self_attn.q_proj"]["mean_gate"])

    Padding is told by ``attention_mask`` and not counted; recomputation under activation checkpointing is not either.

    Args:
        model: a PeftModel, or a model with CoMoL layers.
        adapter_name: PEFT's name of the adapter.
        tasks: labels that `RouterTracker.label_rows` may give to rows.
        completion_only: count tokens only whose own label is not -100.

    Raises:
        ValueError: the model has no such adapter, or a call does not fit.
    """
    tracker = RouterTracker(model, adapter_name, tasks, completion_only)
    try:
        yield tracker
    finally:
        tracker.close()
