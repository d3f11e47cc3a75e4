"""The multi-task data set of the demo: six tasks over the words of the small world, deterministic from a seed.

`python -m comol_ds.demo.tasks` writes data/train.jsonl, data/validation.jsonl and data/test.jsonl, records of
{"prompt", "completion", "task"}. No prompt appears in two splits; the facts behind the prompts do: thirteen is the
answer for whoever had seven and found six more.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path

from comol_ds.demo import DATA_DIR
from comol_ds.demo.world import (
    ANIMALS,
    COLORS,
    DAYS,
    MONTHS,
    NAMES,
    NOUNS,
    NUMBERS,
    SIZES,
    VERBS,
    after,
    quantity,
)

SEED = 20260300
Draw = Callable[[random.Random], tuple[str, str]]  # -> prompt, completion
SPLITS = {"test": 50, "validation": 50, "train": 500}  # records per task


def arithmetic(rng: random.Random) -> tuple[str, str]:
    """A word problem: one addition or subtraction with numbers, and a result, from zero to twenty."""
    name, noun, a, b = rng.choice(NAMES), rng.choice(NOUNS), rng.randint(1, 20), rng.randint(1, 10)
    if rng.random() < 0.5:
        a = min(a, 20 - b)
        return f"{name} had {quantity(a, noun)} and found {NUMBERS[b]} more. How many were there?", NUMBERS[a + b]
    b = min(a, b)
    return f"{name} had {quantity(a, noun)} and lost {NUMBERS[b]}. How many were left?", NUMBERS[a - b]


def sort(rng: random.Random) -> tuple[str, str]:
    """Three to five words into alphabetical order."""
    words = rng.sample(NOUNS, rng.randint(3, 5))
    return f"Sort these words: {', '.join(words)}.", ", ".join(sorted(words))


def reverse(rng: random.Random) -> tuple[str, str]:
    """Three to five words in reverse order."""
    words = rng.sample(NOUNS, rng.randint(3, 5))
    return f"Reverse this list: {', '.join(words)}.", ", ".join(words[::-1])


def replace(rng: random.Random) -> tuple[str, str]:
    """A sentence with every occurrence of one color replaced by another."""
    old, new, other = rng.sample(COLORS, 3)
    second = rng.choice((old, other, rng.choice(SIZES)))
    sentence = f"the {old} {rng.choice(ANIMALS)} {rng.choice(VERBS)} a {second} {rng.choice(NOUNS)}"
    return f"Replace {old} with {new}: {sentence}.", " ".join(new if w == old else w for w in sentence.split())


def calendar(rng: random.Random) -> tuple[str, str]:
    """The day or month that lies one to three steps after or before another."""
    cycle, unit, on = rng.choice(((DAYS, "day", "on"), (MONTHS, "month", "in")))
    name, start, steps, sign = rng.choice(NAMES), rng.choice(cycle), rng.randint(1, 3), rng.choice((1, -1))
    span = f"{NUMBERS[steps]} {unit}{'' if steps == 1 else 's'}"
    asked = f"is it in {span}" if sign == 1 else f"was it {span} ago"
    return f"{name} asks {on} {start}: which {unit} {asked}?", after(cycle, start, sign * steps)


def proceed(rng: random.Random) -> tuple[str, str]:
    """The next two of a row of numbers, days or months that goes up or down."""
    cycle = rng.choice((NUMBERS, DAYS, MONTHS, [str(number) for number in range(100)]))
    length = rng.randint(4, 6)
    start = rng.randint(0, len(cycle) - length)
    row = cycle[start : start + length][:: rng.choice((1, -1))]
    return f"Which two come next: {', '.join(row[:-2])}?", ", ".join(row[-2:])


TASKS: dict[str, Draw] = {
    "arithmetic": arithmetic, "sort": sort, "reverse": reverse, "replace": replace, "calendar": calendar,
    "continue": proceed,
}  # fmt: skip


def build(seed: int = SEED) -> dict[str, list[dict[str, str]]]:
    """All splits, the tasks in turn: the first records of a split hold all tasks equally often.

    A completion starts with a space, so that prompt + completion is the text as it is tokenized.
    """
    rng = random.Random(seed)
    drawn = {task: _distinct(draw, sum(SPLITS.values()), rng) for task, draw in TASKS.items()}
    splits, start = {}, 0
    for name, size in SPLITS.items():
        splits[name] = [drawn[task][row] | {"task": task} for row in range(start, start + size) for task in TASKS]
        start += size
    return splits


def _distinct(draw: Draw, number: int, rng: random.Random) -> list[dict[str, str]]:
    completions: dict[str, str] = {}
    while len(completions) < number:
        prompt, completion = draw(rng)
        completions[prompt] = f" {completion}"
    return [{"prompt": prompt, "completion": completion} for prompt, completion in completions.items()]


def write(folder: Path = DATA_DIR) -> None:
    """Write one JSONL file per split into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in build().items():
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    write()
