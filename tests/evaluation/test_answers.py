"""What counts as the same answer, and which references no answer can equal."""

import pytest

from comol_ds.errors import UserError
from comol_ds.evaluation import answers
from comol_ds.evaluation.answers import ExactMatch, reference_lines
from tests.data.data_helpers import tiny_tokenizer

GSM8K = r"#### (-?[0-9.,]+)"  # as in the README


@pytest.mark.parametrize(
    ("pattern", "answer", "reference", "match"),
    [
        (None, " twelve\n", "twelve", True),
        (None, "twelve.", "twelve", False),
        (None, "1,234", "1234", False),  # whole texts are compared as texts
        (GSM8K, "3 x 4 = 13\n#### 12", "Three times four.\n#### 12", True),
        (GSM8K, "#### 11 no, wait\n#### 12", "#### 12", True),  # the last one counts
        (GSM8K, "#### 12 no, wait\n#### 11", "#### 12", False),
        (GSM8K, "the answer is 12", "#### 12", False),
        (GSM8K, "#### 1234", "#### 1,234", True),
        (GSM8K, "#### 1234.0", "#### 1,234.", True),
        (GSM8K, "#### 1.5", "#### 15", False),
        (GSM8K, "#### -7", "#### 7", False),
        (GSM8K, "nothing", "nothing", False),  # two texts without a finding are not the same
        (r"(yes)|(no)", "yes", "yes", True),
        (r"\b[A-D]\b", "Not A: B", "B", True),
        (r"\b[A-D]\b", "B, not A", "B", False),
        (r"[0-9]*", "7 and", "7", True),  # empty matches are no findings
        (r"[0-9]*", "seven", "eight", False),
        (r"is (.*)", "it is  red ", "so is red", True),
        (r"is (.*)", "it is .", "this is -", False),
    ],
)
def test_exact_match(pattern, answer, reference, match):
    assert ExactMatch(pattern)(answer, reference) is match


def lines(references: list[str], limit: int, pattern: str | None = None) -> list[str]:
    return reference_lines(references, ExactMatch(pattern), tiny_tokenizer(), limit)


def test_references_that_no_answer_is_long_enough_for_are_counted():
    references = ["one", "one two three four five", "one two three four five six seven"]
    lengths = [len(tiny_tokenizer()(reference, add_special_tokens=False)["input_ids"]) for reference in references]
    assert lines(references, lengths[2]) == []
    assert lines(references, lengths[1]) == [
        f"exact match: 1 of 3 references are longer than --max_new_tokens {lengths[1]} and no answer can equal them;"
        f" the longest has {lengths[2]} tokens"
    ]
    assert lines(references, lengths[1] - 1)[0].startswith("exact match: 2 of 3 references are longer")
    assert lines([], 1) == []


def test_with_a_pattern_only_the_finding_must_be_reached():
    early, late = "#### 12 since it is so", "since it is so: #### 12"
    whole = len(tiny_tokenizer()(late, add_special_tokens=False)["input_ids"])
    assert lines([early], whole - 3, GSM8K) == []
    assert len(lines([late], whole - 3, GSM8K)) == 1


def test_a_pattern_that_finds_nothing_in_references_is_counted_or_refused():
    assert lines(["#### 1", "one", "two"], 64, GSM8K) == [
        "exact match: --answer_pattern finds nothing in 2 of 3 references"
    ]
    with pytest.raises(UserError) as error:
        lines(["a" * 90 + " is one", "two"], 64, GSM8K)
    assert str(error.value) == (
        f"--answer_pattern {GSM8K!r} finds nothing in any of the 2 validation answers, such as"
        f" {'a' * 73 + ' is one'!r}; change the pattern"
    )


def test_a_pattern_that_never_ends(monkeypatch):
    monkeypatch.setattr(answers, "_SECONDS", 0.2)
    endless, text = r"(a|aa)+$", "a" * 60 + "b"
    with pytest.raises(UserError) as error:
        lines(["a", text], 5, endless)
    assert str(error.value) == (
        f"--answer_pattern {endless!r} takes more than 0.2 s on one validation answer; write a simpler expression,"
        " without repetitions inside repetitions"
    )
    # what a model writes is known after training only, which it must not end
    assert ExactMatch(endless)(text, "aaa") is False
