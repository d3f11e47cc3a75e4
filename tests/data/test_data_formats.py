"""Columns to text: every format, detection, and what is refused."""

import json

import pytest

from comol_ds.data import formats
from comol_ds.data.formats import detect_format
from comol_ds.errors import UserError


def to_text(row, data_format, where="x row 1", is_conversation=False):
    return formats.to_text(row, data_format, where, is_conversation)


def turns(row, data_format, where="x row 1"):
    return json.loads(to_text(row, data_format, where, is_conversation=True).conversation)["messages"]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["instruction", "input", "output"], "alpaca"),
        (["instruction", "output", "task"], "alpaca"),
        (["id", "prompt", "completion"], "prompt_completion"),
        (["messages"], "messages"),
        (["question", "answer"], "question_answer"),
        (["id", "conversations"], "sharegpt"),
        (["text", "url"], "text"),
        (["text", "instruction", "input", "output"], "alpaca"),
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
    with pytest.raises(UserError, match="'chatml' is not known; choose auto, messages, sharegpt"):
        detect_format(["messages"], "chatml", "x.jsonl")


def test_alpaca_with_and_without_input():
    row = {"instruction": "Add {them}.", "input": "1 and 2", "output": "3"}
    asked, answered = turns(row, "alpaca")
    assert asked == {
        "role": "user",
        "content": "Add {them}.\n\n1 and 2",
        "instruction": "Add {them}.",
        "input": "1 and 2",
    }
    assert answered == {"role": "assistant", "content": "3"}
    for empty in ("", None, "  "):
        assert turns(row | {"input": empty}, "alpaca")[0] == {"role": "user", "content": "Add {them}."}
    literal = to_text(row, "alpaca")
    assert (literal.prompt, literal.completion) == ("Add {them}.\n\n1 and 2", "3")


def test_system_and_history_come_before_the_question():
    row = {"instruction": "And now?", "output": "3", "system": "Be short.", "history": [["How many?", "2"]]}
    roles = ["system", "user", "assistant", "user", "assistant"]
    said = ["Be short.", "How many?", "2", "And now?", "3"]
    expected = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
    assert turns(row, "alpaca") == expected
    asked = {"question": row["instruction"], "answer": row["output"]} | {k: row[k] for k in ("system", "history")}
    assert turns(asked, "question_answer") == expected
    with pytest.raises(UserError, match="a system turn and a column 'system'; drop one of them"):
        turns({"messages": expected, "system": "Be long."}, "messages")
    with pytest.raises(
        UserError, match=r"column 'history' is \['How many\?'\], expected a list of \[question, answer\]"
    ):
        turns(row | {"history": ["How many?"]}, "alpaca")


def test_question_answer_is_put_as_an_instruction():
    asked = to_text({"question": "Why?", "answer": "So."}, "question_answer", is_conversation=True)
    assert asked == to_text({"instruction": "Why?", "output": "So."}, "alpaca", is_conversation=True)


def test_prompt_and_completion_are_taken_literally():
    text = to_text({"prompt": "a\n", "completion": " b"}, "prompt_completion")
    assert (text.prompt, text.completion, text.conversation) == ("a\n", " b", "")


def test_a_prompt_and_a_completion_of_turns_are_one_conversation_that_learns_the_completion():
    ask, say = {"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Two."}
    row = {"prompt": [ask, say, ask], "completion": [say]}
    assert turns(row, "prompt_completion") == [ask, say | {"weight": 0}, ask, say]
    with pytest.raises(UserError, match="x row 1: column 'prompt' is list"):
        to_text(row, "prompt_completion")
    with pytest.raises(UserError, match="x row 1: column 'completion' is list"):
        turns(row | {"prompt": "How many?"}, "prompt_completion")


def test_a_text_is_all_answer():
    assert to_text({"text": "a b"}, "text") == formats.TextRecord("", "a b")


def test_messages_keep_what_they_have_without_nulls():
    given = [{"role": "user", "content": "a", "name": None}, {"role": "assistant", "content": "b", "extra": 1}]
    assert turns({"messages": given}, "messages") == [{"role": "user", "content": "a"}, given[1]]


CALL = {"name": "add", "arguments": {"a": 1, "b": None}}


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1, "b": null}'}}]},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [CALL | {"id": "c1", "type": None}]},
        {"role": "assistant", "tool_calls": [{"id": "c1", "function": CALL}]},
        {"role": "assistant", "content": None, "tool_calls": None, "function_call": CALL},
        {"from": "function_call", "value": json.dumps(CALL)},
    ],
)
def test_tool_calls_are_read_in_every_spelling_with_their_arguments_parsed(turn):
    call = ({"id": "c1"} if "c1" in str(turn) else {}) | {"type": "function", "function": CALL}
    assert turns({"messages": [turn]}, "messages") == [{"role": "assistant", "tool_calls": [call]}]


def test_sharegpt_speakers_become_roles():
    spoken = [("system", "s"), ("human", "q"), ("gpt", "a"), ("observation", "o"), ("chatgpt", "b")]
    row = {"conversations": [{"from": speaker, "value": text} for speaker, text in spoken]}
    roles = ["system", "user", "assistant", "tool", "assistant"]
    assert turns(row, "sharegpt") == [
        {"role": role, "content": text} for role, (_, text) in zip(roles, spoken, strict=True)
    ]
    openai = [{"role": "user", "content": "q"}]
    assert turns({"conversations": openai}, "sharegpt") == openai
    with pytest.raises(UserError, match=r"turn 1 of 'conversations' is from 'narrator'; known: system, human, "):
        turns({"conversations": [{"from": "narrator", "value": "a"}]}, "sharegpt")


def test_text_parts_are_joined_and_other_parts_refused():
    parts = [{"type": "text", "text": "How "}, {"type": "text", "text": "many?"}]
    assert turns({"messages": [{"role": "user", "content": parts}]}, "messages")[0]["content"] == "How many?"
    for part in ({"type": "image_url", "image_url": {"url": "x"}}, {"type": "image", "text": "x"}, "How many?"):
        with pytest.raises(UserError, match=r"x row 1: turn 1 of 'messages' has the part .*; only text is trained"):
            turns({"messages": [{"role": "user", "content": [parts[0], part]}]}, "messages")


def test_tools_are_read_as_lists_or_as_json_and_wrapped_as_servers_hand_them_on():
    schema = {"name": "add", "parameters": {"type": "object", "properties": {}}}
    wrapped = [{"type": "function", "function": schema}]
    row = {"messages": [{"role": "user", "content": "a"}]}
    for tools in (wrapped, [schema], json.dumps(wrapped), [json.dumps(schema)]):
        whole = json.loads(to_text(row | {"tools": tools}, "messages", is_conversation=True).conversation)
        assert whole["tools"] == wrapped
    for nothing in (None, [], "", "[]"):
        assert "tools" not in to_text(row | {"tools": nothing}, "messages", is_conversation=True).conversation
    for tools, reason in (
        ("add", r"column 'tools' 'add' is no JSON"),
        ({"add": 1}, r"column 'tools' is \{'add': 1\}, expected a list of tools"),
        ([{"add": 1}], r"column 'tools' holds \{'add': 1\}, expected"),
    ):
        with pytest.raises(UserError, match=rf"x row 1: {reason}"):
            to_text(row | {"tools": tools}, "messages", is_conversation=True)


def test_a_rows_own_template_variables_are_kept():
    row = {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"enable_thinking": False}}
    whole = json.loads(to_text(row, "messages", is_conversation=True).conversation)
    assert whole["options"] == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("row", "data_format", "is_conversation", "reason"),
    [
        (
            {"messages": [], "images": ["a.png"]},
            "messages",
            True,
            "'images' would be lost, the format messages does not",
        ),
        (
            {"question": "a", "answer": "b", "context": "c"},
            "question_answer",
            True,
            "rename it with --columns; or leave",
        ),
        ({"prompt": "a", "completion": "b", "input": "c"}, "prompt_completion", True, "'input' would be lost"),
        (
            {"prompt": "a", "completion": "b", "system": "c"},
            "prompt_completion",
            False,
            "since no chat template writes the rows; give --prompt_template chat, alpaca or a file; or leave it out "
            "with --columns system=",
        ),
        ({"text": "a", "tools": "[1]"}, "text", False, "'tools' would be lost, the format text does not use it"),
    ],
)
def test_a_column_with_a_meaning_is_used_or_refused_by_name(row, data_format, is_conversation, reason):
    with pytest.raises(UserError, match=f"x row 1: column .*{reason}"):
        to_text(row, data_format, is_conversation=is_conversation)


def test_empty_columns_with_a_meaning_are_nothing():
    row = {"prompt": "a", "completion": "b", "images": [], "system": "", "tools": None}
    assert to_text(row, "prompt_completion") == formats.TextRecord("a", "b")


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
        (
            {"messages": [{"role": "user", "content": 3}]},
            "messages",
            "turn 1 of 'messages' has the content 3, expected text",
        ),
        (
            {"messages": [{"role": "user", "content": "a", "images": ["a.png"]}]},
            "messages",
            "turn 1 of 'messages' holds images; only text is trained",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]},
            "messages",
            r"turn 1 of 'messages' has weight 0.5; 0 \(not trained\) and 1 are known",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": "{"}}]}]},
            "messages",
            "turn 1 of 'messages', the arguments of 'add': '{' is no JSON",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]},
            "messages",
            "has the tool call {'id': '1'}",
        ),
        ({"messages": [{"from": "human"}]}, "messages", r"turn 1 of 'messages' is \{'from': 'human'\}"),
    ],
)
def test_wrong_types_name_row_column_and_value(row, data_format, part):
    with pytest.raises(UserError, match=part):
        to_text(row, data_format, "x.jsonl row 3")
