"""Columns to text: every format, detection, and what is refused."""

import json

import pytest

from comol_ds.data.formats import detect_format, to_text
from comol_ds.errors import UserError


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["instruction", "input", "output"], "alpaca"),
        (["instruction", "output", "task"], "alpaca"),
        (["id", "prompt", "completion"], "prompt_completion"),
        (["messages"], "messages"),
        (["question", "answer"], "question_answer"),
    ],
)
def test_format_is_detected_from_columns(columns, expected):
    assert detect_format(columns, "auto", "x.jsonl") == expected
    assert detect_format(columns, expected, "x.jsonl") == expected


def test_unknown_columns_are_listed_with_the_accepted_formats():
    with pytest.raises(UserError) as error:
        detect_format(["Body", "Question"], "auto", "SVAMP.json")
    message = str(error.value)
    for part in ("SVAMP.json", "found: Body, Question", "alpaca (instruction, output)", "messages (messages)"):
        assert part in message
    assert "\n" not in message


def test_wanted_format_without_its_columns_names_the_missing_one():
    with pytest.raises(UserError, match=r"alpaca needs the column 'output' \(found: instruction, answer\)"):
        detect_format(["instruction", "answer"], "alpaca", "x.jsonl")
    with pytest.raises(UserError, match="'sharegpt' is not known; choose auto, messages"):
        detect_format(["messages"], "sharegpt", "x.jsonl")


def test_alpaca_with_and_without_input():
    row = {"instruction": "Add {them}.", "input": "1 and 2", "output": "3"}
    text = to_text(row, "alpaca", "x row 1")
    assert text.prompt.endswith("### Instruction:\nAdd {them}.\n\n### Input:\n1 and 2\n\n### Response:\n")
    assert text.prompt.startswith("Below is an instruction that describes a task, paired with an input")
    assert text.completion == "3"
    for empty in ("", None, "  "):
        plain = to_text(row | {"input": empty}, "alpaca", "x row 1")
        assert plain.prompt.endswith("### Instruction:\nAdd {them}.\n\n### Response:\n")
        assert "Input" not in plain.prompt


def test_question_answer_is_put_as_an_instruction():
    asked = to_text({"question": "Why?", "answer": "So."}, "question_answer", "x row 1")
    assert asked == to_text({"instruction": "Why?", "output": "So."}, "alpaca", "x row 1")


def test_prompt_and_completion_are_taken_literally():
    text = to_text({"prompt": "a\n", "completion": " b"}, "prompt_completion", "x row 1")
    assert (text.prompt, text.completion, text.messages) == ("a\n", " b", "")


def test_messages_keep_what_they_have_without_nulls():
    turns = [{"role": "user", "content": "a", "name": None}, {"role": "assistant", "content": "b", "extra": 1}]
    text = to_text({"messages": turns}, "messages", "x row 1")
    assert json.loads(text.messages) == [{"role": "user", "content": "a"}, turns[1]]


def test_a_missing_answer_is_empty_and_a_missing_prompt_is_an_error():
    assert to_text({"prompt": "a"}, "prompt_completion", "x row 1").completion == ""
    with pytest.raises(UserError, match="x row 7: column 'prompt' is missing, expected text"):
        to_text({"completion": "a"}, "prompt_completion", "x row 7")


@pytest.mark.parametrize(
    ("row", "data_format", "part"),
    [
        ({"question": "a", "answer": 51.0}, "question_answer", r"row 3: column 'answer' is float \(51.0\)"),
        ({"prompt": ["a"], "completion": "b"}, "prompt_completion", r"row 3: column 'prompt' is list \(\['a'\]\)"),
        ({"messages": "hello"}, "messages", r"row 3: column 'messages' is str \('hello'\), expected a list of turns"),
        ({"messages": []}, "messages", "expected a list of turns"),
        ({"messages": [{"from": "human"}]}, "messages", r"a turn of 'messages' is \{'from': 'human'\}"),
    ],
)
def test_wrong_types_name_row_column_and_value(row, data_format, part):
    with pytest.raises(UserError, match=part):
        to_text(row, data_format, "x.jsonl row 3")
