"""The demo's data set: what the generator writes, correct, and without a prompt in two splits."""

import json
from collections import Counter

import pytest

from comol_ds.demo import TEST_FILE, TRAIN_FILE, VALIDATION_FILE
from comol_ds.demo.tasks import SPLITS, TASKS, build, write
from comol_ds.demo.world import COLORS, DAYS, MONTHS, NUMBERS

DIGITS = tuple(str(number) for number in range(100))
FILES = {"train": TRAIN_FILE, "validation": VALIDATION_FILE, "test": TEST_FILE}


@pytest.fixture(scope="module")
def splits():
    return {
        name: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for name, path in FILES.items()
    }


def test_committed_files_are_the_generators_output(tmp_path):
    write(tmp_path)
    for path in FILES.values():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_another_seed_gives_other_records(splits):
    assert build(seed=1)["test"] != splits["test"]


def test_no_prompt_is_in_two_places(splits):
    prompts = [record["prompt"] for records in splits.values() for record in records]
    assert len(set(prompts)) == len(prompts) == sum(SPLITS.values()) * len(TASKS)


def test_every_task_is_in_every_split_and_in_any_first_records(splits):
    for name, records in splits.items():
        assert Counter(record["task"] for record in records) == dict.fromkeys(TASKS, SPLITS[name])
        assert {record["task"] for record in records[: len(TASKS)]} == set(TASKS)


def test_records_are_small(splits):
    assert sum(path.stat().st_size for path in FILES.values()) < 600_000
    assert all(set(record) == {"prompt", "completion", "task"} for records in splits.values() for record in records)


def solve(task: str, prompt: str) -> str:
    """The answer, worked out from the prompt's text alone."""
    asked, _, body = prompt.rstrip(".?").partition(": ")
    words = body.split(", ")
    if task == "sort":
        return ", ".join(sorted(words))
    if task == "reverse":
        return ", ".join(reversed(words))
    if task == "replace":
        _, old, _, new = asked.split()
        assert {old, new} <= set(COLORS)
        return body.replace(old, new)
    if task == "arithmetic":
        start, change = (NUMBERS.index(word) for word in prompt.replace(".", "").split() if word in NUMBERS)
        return NUMBERS[start + change if " found " in prompt else start - change]
    if task == "continue":
        cycle = next(c for c in (NUMBERS, DAYS, MONTHS, DIGITS) if words[0] in c)
        last, step = cycle.index(words[-1]), cycle.index(words[1]) - cycle.index(words[0])
        return f"{cycle[last + step]}, {cycle[last + 2 * step]}"
    cycle = DAYS if " day " in body else MONTHS
    start, steps = cycle.index(asked.split()[-1]), next(NUMBERS.index(w) for w in body.split() if w in NUMBERS)
    return cycle[(start + (-steps if body.endswith(" ago") else steps)) % len(cycle)]


@pytest.mark.parametrize("task", TASKS)
def test_completions_are_right(splits, task):
    for records in splits.values():
        for record in records:
            if record["task"] == task:
                assert record["completion"] == " " + solve(task, record["prompt"]), record
