"""Held-out loss and exact match, per task. Every rank makes the same number of forward passes (ZeRO-3 gathers)."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from comol_ds.data.tokenization import IGNORED
from comol_ds.evaluation.answers import Answer, ExactMatch
from comol_ds.evaluation.greedy import plain_generation
from comol_ds.parallel.assemble import Assembled
from comol_ds.parallel.groups import gather_objects, mesh, sum_over_data_parallel
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
    exact_match: ExactMatch,
) -> tuple[Evaluation, list[Answer]]:
    """Score the model. A collective call: every rank passes its share, with equally many batches.

    Args:
        assembled: its engine is left in training mode.
        router_load: counts the forward passes over ``batches`` as validation; generation is not counted.
        tasks: names of all tasks, alike on every rank.
        batches: as `comol_ds.data.collate.padded_batch` makes them.
        prompts: left-padded input_ids, attention_mask [B, T], tasks, references (the expected texts) and end_tokens.
        max_new_tokens: longest generated answer, in tokens.
        exact_match: compares answers with references.

    Returns:
        The scores, and every rank's answers in the order of tasks and records; alike on every rank.
    """
    assembled.engine.eval()
    index = {task: row for row, task in enumerate(tasks)}
    sums = torch.zeros(len(tasks), 2, dtype=torch.float64)  # loss, tokens
    mine: list[Answer] = []
    with torch.no_grad():
        for batch in batches:
            _add_losses(sums, index, assembled, router_load, batch, device)
        for batch in prompts:
            mine += _answers(assembled, batch, tokenizer, max_new_tokens, device, exact_match)
    assembled.engine.train()
    sums = sum_over_data_parallel(sums.to(device)).cpu()
    answers = _of_all_ranks(mine)
    scores = {
        task: _score(*sums[row].tolist(), [answer.match for answer in answers if answer.task == task])
        for task, row in index.items()
    }
    overall = _score(*sums.sum(0).tolist(), [answer.match for answer in answers])
    return Evaluation({**scores, "all": overall}), answers


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
        sums[index[batch["tasks"][row]]] += torch.stack([losses[here].sum(), here.sum().double()])


def _answers(
    assembled: Assembled,
    batch: dict,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    device: torch.device,
    exact_match: ExactMatch,
) -> list[Answer]:
    """Greedy answers to a batch of prompts; dummy rows have none."""
    prompt, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
    model = assembled.engine.module
    ends = batch["end_tokens"]  # a chat template may end a turn with another token than the base and its tokenizer do
    with plain_generation(model, tokenizer, end_tokens=ends), assembled.vocabulary.whole_logits():
        output = model.generate(input_ids=prompt, attention_mask=mask, max_new_tokens=max_new_tokens)
    written = tokenizer.batch_decode(output[:, prompt.shape[1] :], skip_special_tokens=True)
    sent = [tokenizer.decode(ids[real.bool()]) for ids, real in zip(prompt, mask, strict=True)]
    rows = zip(batch["record_ids"], batch["tasks"], sent, batch["references"], written, strict=True)
    return [
        Answer(record, task, asked, reference, answer, exact_match(answer, reference))
        for record, task, asked, reference, answer in rows
        if record is not None
    ]


def _of_all_ranks(mine: list[Answer]) -> list[Answer]:
    """The answers of all records; tensor-parallel peers have the same ones. A collective call."""
    found = gather_objects(mine if mesh().grid.tp_rank == 0 else [], "gather the answers")
    return sorted((answer for answers in found for answer in answers), key=lambda answer: (answer.task, answer.record))


def _score(loss: float, tokens: float, matches: list[bool]) -> TaskScore:
    return TaskScore(
        loss / tokens if tokens else float("nan"),
        int(tokens),
        sum(matches) / len(matches) if matches else None,
        len(matches),
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
