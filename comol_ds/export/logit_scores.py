"""Scores of models beside the exact one, on held-out tokens.

KL(exact || other) is the mean over predicted tokens, in nats; top-1 agreement the share of them for which both models
like the same next token best; perplexity exp of the mean loss.

Logits are compared batch by batch and never kept: those of 2000 tokens over 128k words take 1 GB in fp32.

Glossary: B batch, T sequence, N = B*T, n predicted tokens of a batch, V vocabulary.
"""

import copy
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from comol_ds.errors import UserError, one_line
from comol_ds.export.core_sums import Batch, run
from comol_ds.export.static_core import Cores, constant_cores

EXACT = "exact"
IGNORED = -100  # the label of a token that is not predicted
CHUNK_ELEMENTS = 1 << 24  # of [rows, V] in float64: 128 MB for each of two distributions and what is made of them

Logits = Callable[[Batch], torch.Tensor]  # a batch -> logits [n, V] at the positions of `predicted`


@dataclass(frozen=True)
class Score:
    """One model beside the exact one.

    Attributes:
        tokens: predicted tokens.
        kl: mean KL(exact || this model) per predicted token, nats.
        agreement: share of predicted tokens with the same most likely next token.
        perplexity: exp of the mean loss.
    """

    tokens: int
    kl: float
    agreement: float
    perplexity: float


def predicted(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Which positions have a next token to predict: one with a label, or without labels one that is no padding.

    Returns:
        [n] positions below B*T in ascending order, and [n] ids of their next tokens.
    """
    mask = batch["attention_mask"].bool()
    labels = batch.get("labels")
    labels = batch["input_ids"] if labels is None else labels
    targets = torch.where(mask[:, 1:] & mask[:, :-1], labels[:, 1:], IGNORED)
    targets = F.pad(targets, (0, 1), value=IGNORED).flatten()  # N
    positions = (targets != IGNORED).nonzero().squeeze(1)
    return positions, targets[positions]


def logits_of(model: nn.Module) -> Logits:
    """Of a model in evaluation mode that takes input_ids and attention_mask, and returns an object with `logits`."""

    def logits(batch: Batch) -> torch.Tensor:
        whole = run(model, batch).logits  # B T V
        positions, _ = predicted(batch)
        return whole.flatten(0, 1)[positions.to(whole.device)]

    return logits


def base_logits(model: PeftModel) -> Logits:
    """Of the base alone, the adapter switched off."""

    def logits(batch: Batch) -> torch.Tensor:
        with model.disable_adapter():
            return logits_of(model)(batch)

    return logits


def constant_core_logits(model: PeftModel, cores: Cores) -> Logits:
    """Of the exact model with constant cores in the place of its routed ones."""

    def logits(batch: Batch) -> torch.Tensor:
        with constant_cores(model, cores):
            return logits_of(model)(batch)

    return logits


def recorded(logits: Logits, folder: str | os.PathLike) -> Logits:
    """The same, kept in a folder for `replayed`, once the model is no longer in memory: 4 n V bytes in fp32."""

    def record(batch: Batch) -> torch.Tensor:
        found = logits(batch)
        save_file({"logits": found.contiguous().cpu()}, _record(folder, batch))
        return found

    return record


def replayed(folder: str | os.PathLike) -> Logits:
    """What `recorded` kept for the same batches."""
    return lambda batch: load_file(_record(folder, batch))["logits"]


def lora_beside(model: PeftModel, folder: str | os.PathLike) -> PeftModel:
    """A written LoRA folder, loaded with PEFT onto the base of a loaded model: without a second copy of its weights.

    Args:
        model: the exact model; it stays as it is.
        folder: a LoRA folder for the same base.

    Raises:
        UserError: PEFT does not take a LoRA there, such as beside the out_proj of a Mamba.
    """
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    base = copy.deepcopy(model, shared).unload()
    try:
        return PeftModel.from_pretrained(base, folder).eval()
    except ValueError as error:
        raise UserError(f"PEFT refuses a LoRA for this adapter; use --format comol: {one_line(error)}") from error


@torch.no_grad()
def score(exact: Logits, others: Mapping[str, Logits], batches: Iterable[Batch]) -> dict[str, Score]:
    """Score models on held-out tokens, one after the other for each batch.

    Args:
        exact: of the model that routes.
        others: name -> of a model to compare with it.
        batches: input_ids, attention_mask, optionally labels and position_ids, [B, T]; read once.

    Returns:
        "exact" and the others' names -> scores over all predicted tokens.

    Raises:
        UserError: no token is predicted, vocabularies differ, or logits are not finite.
    """
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in (EXACT, *others)}
    tokens = 0
    for batch in batches:
        _, targets = predicted(batch)
        expected = exact(batch)
        tokens += len(targets)
        for name in sums:
            found = expected if name == EXACT else others[name](batch)
            if found.shape != expected.shape:
                raise UserError(
                    f"{name} has a vocabulary of {found.shape[-1]} tokens, the exact model one of {expected.shape[-1]}"
                )
            sums[name] += _sums(expected, found, targets)
    if tokens == 0:
        raise UserError("the held-out data has no token to predict; give more --calibration data")
    return {name: _score(name, total / tokens, tokens) for name, total in sums.items()}


def _sums(exact: torch.Tensor, other: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Logits [n, V] and targets [n] -> [3] sums of KL, agreement and loss, on the CPU."""
    sums = torch.zeros(3, dtype=torch.float64, device=exact.device)
    rows = max(1, CHUNK_ELEMENTS // exact.shape[-1])
    for start in range(0, len(exact), rows):
        here = slice(start, start + rows)
        p = torch.log_softmax(exact[here].double(), dim=-1)
        q = torch.log_softmax(other[here].to(p.device).double(), dim=-1)
        loss = F.nll_loss(q, targets[here].to(p.device), reduction="sum")
        same = (p.argmax(-1) == q.argmax(-1)).sum()
        sums += torch.stack([F.kl_div(q, p, reduction="sum", log_target=True), same.double(), loss])
    return sums.cpu()


def _score(name: str, means: torch.Tensor, tokens: int) -> Score:
    kl, agreement, loss = means.tolist()
    if not (math.isfinite(kl) and math.isfinite(loss)):
        raise UserError(f"{name} gives logits that are not finite on the held-out tokens")
    return Score(tokens, max(kl, 0.0), agreement, means[2].exp().item())


def _record(folder: str | os.PathLike, batch: Batch) -> Path:
    digest = hashlib.sha256()
    for name in sorted(name for name, value in batch.items() if isinstance(value, torch.Tensor)):
        digest.update(f"{name} {list(batch[name].shape)}".encode() + batch[name].cpu().numpy().tobytes())
    return Path(folder) / f"{digest.hexdigest()}.safetensors"
