"""One optimizer step: micro-batches in, one update out, every valid token of the global batch weighing the same."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from comol_ds.data.tokenization import IGNORED
from comol_ds.parallel.assemble import Assembled
from comol_ds.parallel.groups import gather_objects, mesh, sum_over_data_parallel
from comol_ds.training.loss import count_targets, positions_with_loss
from comol_ds.training.router_load import RouterLoad


@dataclass(frozen=True)
class StepResult:
    """Sums over all ranks and micro-batches of one step; ``grad_norm`` is the global norm before clipping."""

    loss_sum: float
    targets: int
    tokens: int
    grad_norm: float


def train_step(
    assembled: Assembled,
    micro_batches: list[dict[str, Any]],
    router_load: RouterLoad,
    device: torch.device,
    step: int,
) -> StepResult:
    """Forward, backward and update over this rank's micro-batches. A collective call.

    The loss is sum over valid tokens / their global count. DeepSpeed averages gradients over the data-parallel ranks,
    which their number as a factor undoes; its own division by the accumulation is switched off.

    Raises:
        RuntimeError: the loss (before the update) or the gradient norm is not finite; names step and records.
    """
    targets = sum(count_targets(batch["labels"]) for batch in micro_batches)
    tokens = sum(int(valid_tokens(batch).sum()) for batch in micro_batches)
    counts = sum_over_data_parallel(torch.tensor([targets, tokens], dtype=torch.float64, device=device)).tolist()
    engine, data_parallel = assembled.engine, mesh().grid.data_parallel
    local_losses = []
    for index, batch in enumerate(micro_batches):
        loss_sum = batch_loss(assembled, batch, router_load, device)
        engine.backward(loss_sum * (data_parallel / counts[0]), scale_wrt_gas=False)
        local_losses.append(loss_sum.detach())
        if index < len(micro_batches) - 1:
            engine.step()  # counts the micro-batch
    total = sum_over_data_parallel(torch.stack(local_losses).double().sum()).item()
    if not math.isfinite(total):
        _stop("loss", total, step, micro_batches, local_losses)
    grad_norm = assembled.gradients.update()
    if not math.isfinite(grad_norm):
        _stop("gradient norm", grad_norm, step, micro_batches, None)
    return StepResult(total, int(counts[0]), int(counts[1]), grad_norm)


def batch_loss(
    assembled: Assembled, batch: dict[str, Any], router_load: RouterLoad, device: torch.device
) -> torch.Tensor:
    """Forward pass over one micro-batch: the sum of its tokens' losses. Logits are computed where there is a loss."""
    positions, targets = positions_with_loss(batch["labels"])
    vocabulary = assembled.vocabulary
    with router_load.counting(valid_tokens(batch).to(device)), vocabulary.only(positions.to(device)):
        logits = assembled.engine(**model_inputs(batch, device)).logits  # [1, n, V]
    return vocabulary.cross_entropy(logits.squeeze(0), targets.to(device), IGNORED).sum()


def model_inputs(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What the model's forward takes: packed rows carry position_ids and no mask, the others a mask."""
    names = [name for name in ("input_ids", "attention_mask", "position_ids") if name in batch]
    return {**{name: batch[name].to(device) for name in names}, "use_cache": False}


def valid_tokens(batch: dict[str, Any]) -> torch.Tensor:
    """[B, T] bool: True where a real token stands."""
    if "attention_mask" in batch:
        return batch["attention_mask"].bool()
    return batch["valid_mask"]


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
