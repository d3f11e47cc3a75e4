"""The small world that both the pretraining text and the tasks speak of: its words, and how they are written.

The words are shared so that a tiny model knows them all. The sentences are not: what `corpus` writes is prose, what
`tasks` asks has its own wording, which the base model has never read.
"""

from collections.abc import Sequence

NAMES = ("Anna", "Ben", "Clara", "Emma", "Finn", "Ida", "Jack", "Leo", "Mia", "Nora", "Oscar", "Paul", "Ruth", "Sam",
         "Tom", "Zoe")  # fmt: skip
NOUNS = ("apple", "bag", "ball", "bell", "boat", "book", "box", "cake", "candle", "chair", "clock", "coat", "coin",
         "cup", "doll", "drum", "flag", "fork", "glove", "hammer", "hat", "jar", "key", "kite", "lamp", "letter",
         "map", "nail", "pear", "pen", "plate", "ring", "rope", "shoe", "spoon", "stone", "table", "umbrella", "vase",
         "wheel")  # fmt: skip
ANIMALS = ("bear", "bird", "cat", "cow", "dog", "duck", "fox", "frog", "goat", "horse", "mouse", "owl", "pig",
           "rabbit", "sheep", "wolf")  # fmt: skip
COLORS = ("black", "blue", "brown", "gray", "green", "pink", "purple", "red", "white", "yellow")
SIZES = ("big", "heavy", "little", "long", "new", "round", "small", "tall")
PLACES = ("barn", "bridge", "forest", "garden", "house", "kitchen", "market", "river", "school", "tower")
VERBS = ("carries", "drops", "finds", "hides", "holds", "paints", "sees", "wants")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
           "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty")  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
          "November", "December")  # fmt: skip


def article(word: str) -> str:
    """The word with its indefinite article."""
    return ("an " if word[0] in "aeiou" else "a ") + word


def plural(noun: str) -> str:
    """The plural of a noun of `NOUNS`."""
    return noun + ("es" if noun[-1] == "x" else "s")


def quantity(count: int, noun: str) -> str:
    """A count in words with its noun: "one cup", "three cups"."""
    return f"{NUMBERS[count]} {noun if count == 1 else plural(noun)}"


def enumeration(words: Sequence[str]) -> str:
    """ "a, b and c"."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def after(cycle: Sequence[str], start: str, steps: int) -> str:
    """The entry `steps` (negative: before) after `start` in a cycle such as the days of the week."""
    return cycle[(cycle.index(start) + steps) % len(cycle)]
