"""English-like text of the small world: what the demo's base model is pretrained on.

A story is a few sentences about two people and what they see, own, count and say. Skills that the tasks need appear
only as things that happen in prose (two numbers make a third, a list is said backwards), never as a task.
"""

import random
from collections.abc import Callable, Iterator

from comol_ds.demo.world import (
    ANIMALS,
    COLORS,
    DAYS,
    MONTHS,
    NAMES,
    NOUNS,
    NUMBERS,
    PLACES,
    SIZES,
    VERBS,
    after,
    article,
    enumeration,
    quantity,
)


class Story:
    """One story: a source of sentences about two people, drawn from one random generator."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.one, self.two = rng.sample(NAMES, 2)

    def pick(self, words: tuple[str, ...]) -> str:
        return self.rng.choice(words)

    def things(self, low: int, high: int) -> list[str]:
        return self.rng.sample(NOUNS, self.rng.randint(low, high))

    def words(self, low: int, high: int) -> list[str]:
        return self.rng.sample(self.rng.choice((NOUNS, NOUNS, ANIMALS, COLORS)), self.rng.randint(low, high))

    def scene(self) -> str:
        """ "the red cat sees a small hat near one tower": also what people read to each other."""
        color = self.pick(COLORS)
        subject = f"the {self.rng.choice((color, self.pick(SIZES)))} {self.pick(ANIMALS)}"
        target = f"a {self.rng.choice((color, self.pick(SIZES), self.pick(COLORS)))} {self.pick(NOUNS)}"
        where = self.rng.choice(("", f" near one {self.pick(PLACES)}", f" in one {self.pick(PLACES)}"))
        return f"{subject} {self.pick(VERBS)} {target}{where}"

    def description(self) -> str:
        return f"{self.scene().capitalize()}."

    def addition(self) -> str:
        a, b, noun = self.rng.randint(0, 20), self.rng.randint(0, 10), self.pick(NOUNS)
        a = min(a, 20 - b)
        total = NUMBERS[a + b]
        return self.pick((
            f"{NUMBERS[a].capitalize()} and {NUMBERS[b]} make {total}.",
            f"{self.one} had {quantity(a, noun)} and found {NUMBERS[b]} more, so there were {total} in the end.",
            f"{self.one} and {self.two} had {quantity(a, noun)} and {quantity(b, noun)}, which is {total} together.",
            f'"I have {quantity(a, noun)} and want {NUMBERS[b]} more," said {self.one}. "Then you have {total}."',
        ))  # fmt: skip

    def subtraction(self) -> str:
        a, noun = self.rng.randint(0, 20), self.pick(NOUNS)
        b = self.rng.randint(0, min(a, 10))
        rest = NUMBERS[a - b]
        return self.pick((
            f"From {NUMBERS[a]} take {NUMBERS[b]} and {rest} stay.",
            f"{self.one} had {quantity(a, noun)} and lost {NUMBERS[b]}, so {rest} were left.",
            f"Of {quantity(a, noun)}, {self.one} gave {NUMBERS[b]} to {self.two} and kept {rest}.",
            f'"I have {quantity(a, noun)} and give you {NUMBERS[b]}," said {self.one}. "Then you have {rest}."',
        ))  # fmt: skip

    def calendar(self) -> str:
        cycle, unit, on = self.rng.choice(((DAYS, "day", "on"), (MONTHS, "month", "in")))
        start, steps = self.pick(cycle), self.rng.randint(1, 3)
        span = f"{NUMBERS[steps]} {unit}{'' if steps == 1 else 's'}"
        later, earlier = after(cycle, start, steps), after(cycle, start, -steps)
        return self.pick((
            f"{self.one} left {on} {start} and came home {span} later, {on} {later}.",
            f"{self.one} came home {on} {start} and had left {span} earlier, {on} {earlier}.",
            f"{span.capitalize()} after {start} comes {later}.",
            f"{span.capitalize()} before {start} comes {earlier}.",
            f'"It is {start} now," said {self.one}, "so in {span} it will be {later}."',
            f'"It is {start} now," said {self.one}, "so {span} back it was {earlier}."',
        ))  # fmt: skip

    def sequence(self) -> str:
        cycle = self.rng.choice((DAYS, MONTHS, NUMBERS, tuple(map(str, range(100)))))
        length, step = self.rng.randint(3, 6), self.rng.choice((1, 1, -1))
        start = self.rng.randrange(len(cycle) - length)
        run = cycle[start : start + length][::step]
        return f"{self.one} counted {'up' if step == 1 else 'down'}: {', '.join(run)}."

    def alphabet(self) -> str:
        words = self.things(2, 5)
        ordered, named = ", ".join(sorted(words)), enumeration([article(word) for word in words])
        return self.pick((
            f"{self.one} had {named}, and in the book from A to Z they are {ordered}.",
            f"{self.one} wrote the words {', '.join(words)}, but {self.two} wrote them from A to Z: {ordered}.",
        ))  # fmt: skip

    def echo(self) -> str:
        words = self.words(2, 5)
        said = ", ".join(words)
        return self.pick((
            f"{self.one} said {said}, and {self.two} said it backwards: {', '.join(words[::-1])}.",
            f"{self.one} said {said}, and {self.two} said it too: {said}.",
            f"The list of {self.one} was {said}, and from the end it was {', '.join(words[::-1])}.",
        ))  # fmt: skip

    def retelling(self) -> str:
        scene = self.scene()
        old = self.rng.choice([word for word in scene.split() if word in COLORS + SIZES])
        new = self.rng.choice([word for word in (COLORS if old in COLORS else SIZES) if word != old])
        changed = " ".join(new if word == old else word for word in scene.split())
        return self.pick((
            f"{self.one} read that {scene}, and {self.two} read it too: {scene}.",
            f"{self.one} read that {scene}, but it was {new} and not {old}: {changed}.",
            f"{self.one} said {new} for {old}, so when {self.two} read that {scene}, {self.one} said that {changed}.",
        ))  # fmt: skip

    def inventory(self) -> str:
        kinds = self.things(2, 3)
        seen = [self.rng.choice(kinds) for _ in range(self.rng.randint(3, 5))]
        amounts = enumeration([quantity(seen.count(kind), kind) for kind in dict.fromkeys(seen)])
        return f"In a row lay {', '.join(seen)}, and that is {amounts}."

    def occurrences(self) -> str:
        kinds = self.words(2, 3)
        seen = [self.rng.choice(kinds) for _ in range(self.rng.randint(3, 5))]
        row, word = ", ".join(seen), self.rng.choice(kinds)
        times = NUMBERS[seen.count(word)]
        return self.pick((
            f"{self.one} saw {row}, so the {word} was there {times} times.",
            f"The list of {self.one} was {row}, and {self.two} read {word} {times} times.",
            f"{self.two} heard {word} {times} times when {self.one} said {row}.",
        ))  # fmt: skip

    def dialogue(self) -> str:
        mine, yours = self.rng.sample(NOUNS, 2)
        my_color, your_color = self.rng.sample(COLORS, 2)
        asked, owner, color = self.rng.choice(((mine, self.one, my_color), (yours, self.two, your_color)))
        facts = f"{self.one} has {article(my_color)} {mine} and {self.two} has {article(your_color)} {yours}."
        return facts + self.pick((
            f' "Who has the {asked}?" asked the {self.pick(ANIMALS)}. "{owner} has it."',
            f' "What color is the {asked}?" asked the {self.pick(ANIMALS)}. "It is {color}."',
        ))  # fmt: skip

    def ages(self) -> str:
        a, b = self.rng.sample(range(2, 99), 2)
        older = self.one if a > b else self.two
        return f"{self.one} is {a} years old and {self.two} is {b}, so {older} is older."

    def shopping(self) -> str:
        goods = [quantity(self.rng.randint(1, 9), noun) for noun in self.things(1, 3)]
        price = self.rng.randint(2, 99)
        return f"At the {self.pick(PLACES)}, {self.one} bought {enumeration(goods)} for {price} coins."


# How often each kind of sentence comes; what is learned late (counting, retelling) comes more often.
WEIGHTS: dict[Callable[[Story], str], int] = {
    Story.description: 1, Story.addition: 2, Story.subtraction: 2, Story.calendar: 3, Story.sequence: 1,
    Story.alphabet: 2, Story.echo: 2, Story.retelling: 4, Story.inventory: 1, Story.occurrences: 3, Story.dialogue: 1,
    Story.ages: 1, Story.shopping: 1,
}  # fmt: skip


def stories(seed: int, sentences: int = 5) -> Iterator[str]:
    """An endless stream of stories of `sentences` sentences each; equal for equal seeds."""
    rng = random.Random(seed)
    kinds, weights = list(WEIGHTS), list(WEIGHTS.values())
    while True:
        story = Story(rng)
        yield " ".join(write(story) for write in rng.choices(kinds, weights, k=sentences))
