"""One optimizer step: micro-batches in, one update out, every valid token of the global batch weighing the same."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from comol_ds.data.tokenization import IGNORED
from comol_ds.parallel.assemble import Assembled
from comol_ds.parallel.groups import gather_objects, mesh, sum_over_data_parallel, sum_over_tensor_parallel
from comol_ds.training.loss import count_targets, positions_with_loss
from comol_ds.training.router_load import RouterLoad, routed_tokens, valid_tokens


@dataclass(frozen=True)
class StepResult:
    """Sums over all ranks and micro-batches of one step.

    Attributes:
        loss_sum: of the language-model loss over target tokens, nats.
        targets: target tokens.
        tokens: tokens without padding.
        grad_norm: the global norm before clipping.
        router_losses: name -> value, without its coefficient, of the losses in use; not part of ``loss_sum``.
        stop_requests: how often the ranks were asked to stop; the same number on all, 0 if none was.
    """

    loss_sum: float
    targets: int
    tokens: int
    grad_norm: float
    router_losses: dict[str, float] = field(default_factory=dict)
    stop_requests: int = 0


def train_step(
    assembled: Assembled,
    micro_batches: list[dict[str, Any]],
    router_load: RouterLoad,
    device: torch.device,
    step: int,
    detail: bool = False,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> StepResult:
    """Forward, backward and update over this rank's micro-batches. A collective call.

    The loss is sum over valid tokens / their global count. DeepSpeed averages gradients over the data-parallel ranks,
    which their number as a factor undoes; its own division by the accumulation is switched off.

    Args:
        assembled: its engine is in training mode.
        micro_batches: as `comol_ds.data.collate` makes them.
        router_load: counts the routers.
        device: the model's.
        step: number of the step, for messages.
        detail: whether ``router_load`` counts with detail.
        asked_to_stop: whether this rank was; called once, after the last backward pass.

    Raises:
        RuntimeError: the loss (before the update) or the gradient norm is not finite; names step and records.
    """
    targets = sum(count_targets(batch["labels"]) for batch in micro_batches)
    tokens = sum(int(valid_tokens(batch).sum()) for batch in micro_batches)
    routed = [routed_tokens(batch, router_load.settings) for batch in micro_batches]
    own_counts = [targets, tokens, sum(int(mask.sum()) for mask in routed)]
    counts = sum_over_data_parallel(torch.tensor(own_counts, dtype=torch.float64, device=device)).tolist()
    engine, losses, data_parallel = assembled.engine, assembled.router_losses, mesh().grid.data_parallel
    local_losses = []
    for index, (batch, mask) in enumerate(zip(micro_batches, routed, strict=True)):
        with losses.attached(mask, counts[2], device):
            loss_sum = batch_loss(assembled, batch, router_load, device, detail)
            engine.backward(loss_sum * (data_parallel / counts[0]), scale_wrt_gas=False)
        local_losses.append(loss_sum.detach())
        if index < len(micro_batches) - 1:
            engine.step()  # counts the micro-batch
    stop = torch.tensor([asked_to_stop()], dtype=torch.float64, device=device)
    own_sums = torch.cat([torch.stack(local_losses).double().sum().view(1), stop, losses.step_sums(device)])
    total, stop, router_sums = sum_over_data_parallel(own_sums).split([1, 1, own_sums.numel() - 2])
    # the request may have reached one data-parallel group only, and one rank of every such group sits in this group
    stop_requests = int(sum_over_tensor_parallel(stop.clone()).item())
    total = total.item()
    if not math.isfinite(total):
        _stop("loss", total, step, micro_batches, local_losses)
    grad_norm = assembled.gradients.update()
    if not math.isfinite(grad_norm):
        _stop("gradient norm", grad_norm, step, micro_batches, None)
    return StepResult(total, int(counts[0]), int(counts[1]), grad_norm, losses.finish_step(router_sums), stop_requests)


def batch_loss(
    assembled: Assembled, batch: dict[str, Any], router_load: RouterLoad, device: torch.device, detail: bool = False
) -> torch.Tensor:
    """Forward pass over one micro-batch: the sum of its tokens' losses. Logits are computed where there is a loss."""
    positions, targets = positions_with_loss(batch["labels"])
    vocabulary = assembled.vocabulary
    with router_load.counting(batch, device, detail=detail), vocabulary.only(positions.to(device)):
        logits = assembled.engine(**model_inputs(batch, device)).logits  # [1, n, V]
    return vocabulary.cross_entropy(logits.squeeze(0), targets.to(device), IGNORED).sum()


def model_inputs(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What the model's forward takes: packed rows carry position_ids and no mask, the others a mask."""
    names = [name for name in ("input_ids", "attention_mask", "position_ids") if name in batch]
    return {**{name: batch[name].to(device) for name in names}, "use_cache": False}


def _stop(what: str, value: float, step: int, micro_batches: list[dict], losses: list[torch.Tensor] | None) -> None:
    """All ranks see the same non-finite number; name the records of the micro-batches that it came from, if known."""
    suspects = [
        record
        for index, batch in enumerate(micro_batches)
        if losses is None or not math.isfinite(losses[index].item())
        for record in batch["record_ids"]
    ]
    everywhere = [record for ranks in gather_objects(suspects, "report a non-finite number") for record in ranks]
    raise RuntimeError(
        f"step {step}: {what} is {value}; records of the batch: {', '.join(map(str, everywhere))}."
        " Inspect them, lower --learning_rate, or resume from the last checkpoint"
    )
