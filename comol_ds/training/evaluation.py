"""Held-out loss and exact match, per task. Every rank makes the same number of forward passes (ZeRO-3 gathers)."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from comol_ds.data.tokenization import IGNORED
from comol_ds.parallel.assemble import Assembled
from comol_ds.parallel.groups import sum_over_data_parallel
from comol_ds.training.loss import token_losses


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
        tasks: names of all tasks, alike on every rank.
        batches: input_ids, labels, attention_mask [B, T] and tasks (a list of B names).
        prompts: left-padded input_ids, attention_mask [B, T], tasks and references (the expected texts).
        max_new_tokens: longest generated answer, in tokens.
    """
    assembled.engine.eval()
    index = {task: row for row, task in enumerate(tasks)}
    sums = torch.zeros(len(tasks), 4, dtype=torch.float64)  # loss, tokens, exact, generated
    with torch.no_grad():
        for batch in batches:
            _add_losses(sums, index, assembled, batch, device)
        for batch in prompts:
            _add_matches(sums, index, assembled, batch, tokenizer, max_new_tokens, device)
    assembled.engine.train()
    sums = sum_over_data_parallel(sums.to(device)).cpu()
    scores = {task: _score(*sums[row].tolist()) for task, row in index.items()}
    return Evaluation({**scores, "all": _score(*sums.sum(0).tolist())})


def _add_losses(
    sums: torch.Tensor, index: dict[str, int], assembled: Assembled, batch: dict, device: torch.device
) -> None:
    labels = batch["labels"].to(device)
    logits = assembled.engine(
        input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device), use_cache=False
    ).logits
    losses = token_losses(logits, labels, assembled.vocabulary).sum(1).double().cpu()  # B
    counts = (batch["labels"][:, 1:] != IGNORED).sum(1)
    for task, loss, count in zip(batch["tasks"], losses, counts, strict=True):
        if count:  # the rows that only level the number of batches have none
            sums[index[task], :2] += torch.stack([loss, count.double()])


def _add_matches(
    sums: torch.Tensor,
    index: dict[str, int],
    assembled: Assembled,
    batch: dict,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    device: torch.device,
) -> None:
    prompt = batch["input_ids"].to(device)
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    mask = batch["attention_mask"].to(device)
    with assembled.vocabulary.whole_logits():
        output = assembled.engine.module.generate(input_ids=prompt, attention_mask=mask, generation_config=greedy)
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
