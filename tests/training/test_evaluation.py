"""Held-out loss and exact match of a tiny model, against one record at a time."""

import math
from collections import defaultdict

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from comol_ds.config import AdapterSettings
from comol_ds.data.batches import EvalBatches, generation_batches
from comol_ds.data.tokenization import RecordTokenizer
from comol_ds.evaluation.answers import Answer, ExactMatch
from comol_ds.parallel.assemble import Assembled, attach_adapter
from comol_ds.parallel.vocabulary import Vocabulary
from comol_ds.training.evaluation import Evaluation, TaskScore, comparison_table, evaluate
from comol_ds.training.router_load import RouterLoad
from tests.data.data_helpers import sums, tiny_tokenizer
from tests.hostile_generation import hostile_values
from tests.tiny_models import FAMILIES

NEW_TOKENS = 4
TOKENIZER = tiny_tokenizer()


class Engine:
    """What evaluate() asks of the DeepSpeed engine."""

    def __init__(self, module: torch.nn.Module):
        self.module = module

    def __call__(self, **inputs):
        assert not self.module.training and not torch.is_grad_enabled()
        return self.module(**inputs)

    def eval(self) -> None:
        self.module.eval()

    def train(self) -> None:
        self.module.train()


def assembled(model: torch.nn.Module) -> Assembled:
    """What evaluate() reads of an assembled run."""
    vocabulary = Vocabulary()
    vocabulary.watch_head(model.get_base_model().get_output_embeddings())
    return Assembled(Engine(model), vocabulary, gradients=None, router_losses=None, hf_ds_config=None)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(2)
    base = AutoModelForCausalLM.from_config(FAMILIES["llama"])
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(4)  # predictions far from uniform: no near ties between tokens
    adapted = attach_adapter(base, AdapterSettings(r=4, num_experts=2, lora_dropout=0.5), seed=0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "comol_B" in name:
                parameter.normal_()
    return adapted.train()


def greedy(model: torch.nn.Module, prompt: list[int]) -> list[int]:
    """The answer token by token, without padding or cache."""
    ids = list(prompt)
    for _ in range(NEW_TOKENS):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == TOKENIZER.eos_token_id:
            break
    return ids[len(prompt) :]


def greedy_ids(model: torch.nn.Module, row: dict) -> list[int]:
    model.eval()
    with torch.no_grad():
        answer = greedy(model, row["input_ids"][: row["prompt_length"]])
    model.train()
    return answer


def greedy_of(model: torch.nn.Module, row: dict) -> str:
    return TOKENIZER.decode(greedy_ids(model, row), skip_special_tokens=True)


@pytest.fixture(scope="module")
def records(model):
    """Records of two tasks; the answers of every second one are what the model says."""
    rows = [*sums(7, task="short"), *sums(4, task="other")]
    texts = {
        "record_id": [f"x:{i}" for i in range(len(rows))],
        "task": [row["task"] for row in rows],
        "prompt": [row["prompt"] for row in rows],
        "completion": [row["completion"] for row in rows],
        "conversation": [""] * len(rows),
    }
    data = datasets.Dataset.from_dict(RecordTokenizer(TOKENIZER, max_length=64)(texts))
    said = [greedy_of(model, row) for row in data]
    assert len(set(said)) > 1
    references = [f"  {answer}\n" if i % 2 else "something else" for i, answer in enumerate(said)]
    return data.remove_columns("reference").add_column("reference", references)


def literal_losses(model: torch.nn.Module, records: datasets.Dataset) -> dict[str, list[float]]:
    """Task -> negative log-probability of every answer token, from one unpadded forward per record."""
    losses = defaultdict(list)
    model.eval()
    for record in records:
        with torch.no_grad():
            logits = model(torch.tensor([record["input_ids"]])).logits[0].double()
        for position, label in enumerate(record["labels"][1:]):
            if label != -100:
                losses[record["task"]].append(-logits[position].log_softmax(0)[label].item())
    model.train()
    return losses


def score(model, records, batch_size: int, prompts: int | None) -> Evaluation:
    return score_and_answers(model, records, batch_size, prompts)[0]


def score_and_answers(
    model, records, batch_size: int, prompts: int | None, pattern: str | None = None
) -> tuple[Evaluation, list[Answer]]:
    return evaluate(
        assembled(model),
        RouterLoad(model),
        sorted(set(records["task"])),
        EvalBatches(records, batch_size, 0, 1, TOKENIZER.pad_token_id),
        generation_batches(records, batch_size, 0, 1, TOKENIZER.pad_token_id, prompts),
        TOKENIZER,
        NEW_TOKENS,
        torch.device("cpu"),
        ExactMatch(pattern),
    )


def test_an_answer_ends_where_its_kind_is_trained_to_end(model, records):
    """A chat template's end of turn that is neither the tokenizer's end of sequence nor the base's."""
    one = records.select([0])
    ids = greedy_ids(model, one[0])
    assert len(ids) == NEW_TOKENS, "the case needs an answer that goes on"
    end = ids[1]
    ended = one.map(lambda row: {"input_ids": [*row["input_ids"][:-1], end]})
    (cut,) = score_and_answers(model, ended, 1, None)[1]
    assert cut.answer == TOKENIZER.decode(ids[: ids.index(end) + 1], skip_special_tokens=True)
    assert len(ids[: ids.index(end) + 1]) < NEW_TOKENS


@pytest.mark.parametrize("batch_size", [1, 4, 16])  # 4 and 16 need dummy rows for 11 records
def test_loss_and_exact_match(batch_size, model, records):
    found = score(model, records, batch_size, prompts=None)
    losses = literal_losses(model, records)
    assert list(found.tasks) == ["other", "short", "all"]
    for task, values in {**losses, "all": losses["other"] + losses["short"]}.items():
        assert found.tasks[task].loss == pytest.approx(sum(values) / len(values), rel=1e-5)
        assert found.tasks[task].tokens == len(values)
    matches = {task: (score.exact_match, score.generated) for task, score in found.tasks.items()}
    # rows 1, 3, 5 of the 7 short ones, and 7, 9 of the 4 others
    assert matches == {"short": (3 / 7, 7), "other": (2 / 4, 4), "all": (5 / 11, 11)}
    assert model.training  # left as training wants it


def test_exact_match_obeys_nothing_of_the_bases_generation_configuration(model, records):
    plain = score(model, records, 4, prompts=None)
    base, kept = model.get_base_model(), model.get_base_model().generation_config
    base.generation_config = GenerationConfig.from_dict(kept.to_dict())
    for name, value in hostile_values(base.generation_config):
        setattr(base.generation_config, name, value)
    try:
        assert score(model, records, 4, prompts=None) == plain
        assert plain.overall.exact_match == 5 / 11
    finally:
        base.generation_config = kept


def test_every_answer_is_told_with_its_prompt_and_reference(model, records):
    _, answers = score_and_answers(model, records, 4, prompts=None)
    said = {record: greedy_of(model, row) for record, row in zip(records["record_id"], records, strict=True)}
    assert [(answer.task, answer.record) for answer in answers] == sorted(
        zip(records["task"], records["record_id"], strict=True)
    )
    by_id = {row["record_id"]: row for row in records}
    for answer in answers:
        row = by_id[answer.record]
        assert answer.prompt == TOKENIZER.decode(row["input_ids"][: row["prompt_length"]])
        assert (answer.reference, answer.answer) == (row["reference"], said[answer.record])
        assert answer.match == (answer.answer.strip() == answer.reference.strip())


def test_a_pattern_chooses_what_is_compared(model, records):
    found, answers = score_and_answers(model, records, 4, prompts=None, pattern=r"^\s*(\S)")
    firsts = [(answer.answer.strip()[:1], answer.reference.strip()[:1]) for answer in answers]
    assert found.overall.exact_match == sum(said == wanted for said, wanted in firsts) / 11
    assert [answer.match for answer in answers] == [said == wanted for said, wanted in firsts]


def test_a_bounded_number_of_answers_comes_from_every_task(model, records):
    found = score(model, records, 4, prompts=3)
    assert {task: score.generated for task, score in found.tasks.items()} == {"short": 2, "other": 1, "all": 3}
    none = score(model, records, 4, prompts=0)
    assert {score.exact_match for score in none.tasks.values()} == {None}
    assert none.overall.loss == pytest.approx(found.overall.loss, rel=1e-12)


def test_a_task_without_tokens_has_no_loss(model, records):
    found, _ = evaluate(
        assembled(model),
        RouterLoad(model),
        ["absent", "other"],
        EvalBatches(records.filter(lambda row: row["task"] == "other"), 4, 0, 1, 0),
        [],
        TOKENIZER,
        NEW_TOKENS,
        torch.device("cpu"),
        ExactMatch(),
    )
    assert math.isnan(found.tasks["absent"].loss) and found.tasks["absent"].tokens == 0
    assert found.overall == found.tasks["other"]


def evaluation(*scores: TaskScore) -> Evaluation:
    return Evaluation(dict(zip(("reverse", "sort", "all"), scores, strict=True)))


def test_comparison_table():
    before = evaluation(TaskScore(2.5, 9, 0.0, 4), TaskScore(3.25, 5, None, 0), TaskScore(2.75, 14, 0.0, 4))
    after = evaluation(TaskScore(0.5, 9, 0.75, 4), TaskScore(1.25, 5, None, 0), TaskScore(0.75, 14, 0.75, 4))
    lines = [line.split() for line in comparison_table(before, after).splitlines()]
    assert lines == [
        ["task", "loss", "exact", "match", "answers"],
        ["reverse", "2.500", "->", "0.500", "0%", "->", "75%", "4"],
        ["sort", "3.250", "->", "1.250", "-", "0"],
        ["all", "2.750", "->", "0.750", "0%", "->", "75%", "4"],
    ]
    lines = [line.split() for line in comparison_table(None, after).splitlines()]
    assert lines[1:] == [
        ["reverse", "0.500", "75%", "4"],
        ["sort", "1.250", "-", "0"],
        ["all", "0.750", "75%", "4"],
    ]
    widths = {len(line) for line in comparison_table(before, after).splitlines()}
    assert len(widths) == 1  # columns stand under each other


def test_json_form():
    scores = evaluation(TaskScore(0.5, 9, 0.75, 4), TaskScore(1.0, 5, None, 0), TaskScore(0.7, 14, 0.75, 4)).as_json()
    assert scores["sort"] == {"loss": 1.0, "tokens": 5, "exact_match": None, "generated": 0}
