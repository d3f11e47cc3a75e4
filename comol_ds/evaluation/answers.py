"""Whether an answer says what its reference says, and what keeps a run's answers from ever doing so."""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

import regex
from transformers import PreTrainedTokenizerBase

from comol_ds.errors import UserError

# A thousandth is enough for an answer; the package regex has this limit, and Python's re has none.
_SECONDS = 5
# 1,234 and 1234.0 and "12." at the end of a sentence; thousands are set off by commas, as GSM8K does.
_NUMBER = regex.compile(r"([+-]?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+))\.?")


@dataclass(frozen=True)
class Answer:
    """A generated answer, as a line of generations.jsonl has it.

    Attributes:
        record: id of the record.
        task: its label.
        prompt: what was sent, with its special tokens.
        reference: the answer that is trained, decoded without special tokens.
        answer: what was generated, decoded so too.
        match: whether they say the same, see `ExactMatch`.
    """

    record: str
    task: str
    prompt: str
    reference: str
    answer: str
    match: bool


class ExactMatch:
    """Compares answers with references: the whole texts without the white space around them, or what a pattern finds.

    Of a pattern's matches in a text the last one that is not empty counts, and of that its first group if the pattern
    has one. Two findings that are numbers are compared as numbers: 1,234 and 1234.0 are one.

    Args:
        pattern: a regular expression in Python's syntax, or None. An answer on which it does not end matches nothing.
    """

    def __init__(self, pattern: str | None = None) -> None:
        self.pattern = None if pattern is None else regex.compile(pattern)

    def __call__(self, answer: str, reference: str) -> bool:
        try:
            found, expected = self.final(answer), self.final(reference)
        except TimeoutError:
            return False
        return found is not None and found == expected

    def final(self, text: str) -> str | Decimal | None:
        """What of a text is compared; None where the pattern finds nothing.

        Raises:
            TimeoutError: the pattern has not ended after `_SECONDS`.
        """
        if self.pattern is None:
            return text.strip()
        group = 1 if self.pattern.groups else 0
        found = [match[group].strip() for match in self.pattern.finditer(text, timeout=_SECONDS) if match[group]]
        last = next(filter(None, reversed(found)), None)
        number = _NUMBER.fullmatch(last or "")
        return Decimal(number[1].replace(",", "")) if number else last


def reference_lines(
    references: Sequence[str], exact_match: ExactMatch, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> list[str]:
    """What a run must be told of the answers that it will be compared with: a line per kind of those that none equals.

    Raises:
        UserError: the pattern finds nothing in any of them, or does not end.
    """
    try:
        without = sum(exact_match.final(reference) is None for reference in references)
    except TimeoutError as error:
        raise UserError(
            f"--answer_pattern {exact_match.pattern.pattern!r} takes more than {_SECONDS} s on one validation answer;"
            " write a simpler expression, without repetitions inside repetitions"
        ) from error
    if references and without == len(references):
        raise UserError(
            f"--answer_pattern {exact_match.pattern.pattern!r} finds nothing in any of the {without} validation"
            f" answers, such as {references[0].strip()[-80:]!r}; change the pattern"
        )
    lines = []
    if without:
        lines.append(f"exact match: --answer_pattern finds nothing in {without} of {len(references)} references")
    lengths = []
    for reference in references:
        ids = tokenizer(reference, add_special_tokens=False)["input_ids"]
        cut = tokenizer.decode(ids[:max_new_tokens], skip_special_tokens=True)
        if len(ids) > max_new_tokens and not exact_match(cut, reference):
            lengths.append(len(ids))
    if lengths:
        lines.append(
            f"exact match: {len(lengths)} of {len(references)} references are longer than --max_new_tokens"
            f" {max_new_tokens} and no answer can equal them; the longest has {max(lengths)} tokens"
        )
    return lines
