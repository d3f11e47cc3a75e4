"""Held-out loss and exact match, per task. Every rank makes the same number of forward passes (ZeRO-3 gathers)."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from comol_ds.data.tokenization import IGNORED
from comol_ds.evaluation.greedy import plain_generation
from comol_ds.parallel.assemble import Assembled
from comol_ds.parallel.groups import sum_over_data_parallel
from comol_ds.router_load.counting import VALIDATION
from comol_ds.training.loss import positions_with_loss
from comol_ds.training.router_load import RouterLoad
from comol_ds.training.step import model_inputs


@dataclass(frozen=True)
class TaskScore:
    """Loss is the mean over the task's target tokens; exact match the fraction of ``generated`` answers."""

    loss: float
    tokens: int
    exact_match: float | None
    generated: int


@dataclass(frozen=True)
class Evaluation:
    """Scores per task, and over all tokens and answers under the name ``all``."""

    tasks: dict[str, TaskScore]

    @property
    def overall(self) -> TaskScore:
        return self.tasks["all"]

    def as_json(self) -> dict[str, Any]:
        return {name: vars(score) for name, score in self.tasks.items()}


def evaluate(
    assembled: Assembled,
    router_load: RouterLoad,
    tasks: list[str],
    batches: Iterable[dict[str, Any]],
    prompts: Iterable[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    device: torch.device,
) -> Evaluation:
    """Score the model. A collective call: every rank passes its share, with equally many batches.

    Args:
        assembled: its engine is left in training mode.
        router_load: counts the forward passes over ``batches`` as validation; generation is not counted.
        tasks: names of all tasks, alike on every rank.
        batches: as `comol_ds.data.collate.padded_batch` makes them.
        prompts: left-padded input_ids, attention_mask [B, T], tasks and references (the expected texts).
        max_new_tokens: longest generated answer, in tokens.
    """
    assembled.engine.eval()
    index = {task: row for row, task in enumerate(tasks)}
    sums = torch.zeros(len(tasks), 4, dtype=torch.float64)  # loss, tokens, exact, generated
    with torch.no_grad():
        for batch in batches:
            _add_losses(sums, index, assembled, router_load, batch, device)
        for batch in prompts:
            _add_matches(sums, index, assembled, batch, tokenizer, max_new_tokens, device)
    assembled.engine.train()
    sums = sum_over_data_parallel(sums.to(device)).cpu()
    scores = {task: _score(*sums[row].tolist()) for task, row in index.items()}
    return Evaluation({**scores, "all": _score(*sums.sum(0).tolist())})


def _add_losses(
    sums: torch.Tensor,
    index: dict[str, int],
    assembled: Assembled,
    router_load: RouterLoad,
    batch: dict,
    device: torch.device,
) -> None:
    positions, targets = positions_with_loss(batch["labels"])
    vocabulary = assembled.vocabulary
    with router_load.counting(batch, device, VALIDATION), vocabulary.only(positions.to(device)):
        logits = assembled.engine(**model_inputs(batch, device)).logits  # [1, n, V]
    losses = vocabulary.cross_entropy(logits.squeeze(0), targets.to(device), IGNORED).double().cpu()  # n
    # rows that only level the number of batches have no position, and no task
    rows = positions // batch["labels"].shape[1]
    for row in rows.unique().tolist():
        here = rows == row
        sums[index[batch["tasks"][row]], :2] += torch.stack([losses[here].sum(), here.sum().double()])


def _add_matches(
    sums: torch.Tensor,
    index: dict[str, int],
    assembled: Assembled,
    batch: dict,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    device: torch.device,
) -> None:
    prompt, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
    model = assembled.engine.module
    with plain_generation(model, tokenizer), assembled.vocabulary.whole_logits():
        output = model.generate(input_ids=prompt, attention_mask=mask, max_new_tokens=max_new_tokens)
    answers = tokenizer.batch_decode(output[:, prompt.shape[1] :], skip_special_tokens=True)
    for task, answer, reference in zip(batch["tasks"], answers, batch["references"], strict=True):
        if reference is not None:
            sums[index[task], 2:] += torch.tensor([answer.strip() == reference.strip(), 1], dtype=torch.float64)


def _score(loss: float, tokens: float, exact: float, generated: float) -> TaskScore:
    return TaskScore(
        loss / tokens if tokens else float("nan"), int(tokens), exact / generated if generated else None, int(generated)
    )


def comparison_table(before: Evaluation | None, after: Evaluation) -> str:
    """A small table, one line per task: loss and exact match, before -> after where ``before`` is known."""
    lines = [f"{'task':<24} {'loss':>18} {'exact match':>20} {'answers':>8}"]
    for name, score in after.tasks.items():
        old = before.tasks[name] if before else None
        loss = f"{score.loss:.3f}" if old is None else f"{old.loss:.3f} -> {score.loss:.3f}"
        lines.append(f"{name:<24} {loss:>18} {_matches(old, score):>20} {score.generated:>8}")
    return "\n".join(lines)


def _matches(old: TaskScore | None, new: TaskScore) -> str:
    if new.exact_match is None:
        return "-"
    after = f"{new.exact_match:.0%}"
    return after if old is None or old.exact_match is None else f"{old.exact_match:.0%} -> {after}"
