"""How a record is written: from the columns of one row to one prompt and one answer, or to a conversation."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from comol_ds.data.turns import is_empty, read_history, read_options, read_tools, read_turns, short
from comol_ds.errors import UserError

# Columns each format needs, in the order of detection: the first whose columns are all there wins.
FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "question_answer": ("question", "answer"),
    "text": ("text",),
}
# Columns that a format may have beside them.
_OPTIONAL: dict[str, tuple[str, ...]] = {"alpaca": ("input",), "question_answer": ("input",)}
# What a conversation can carry beside its turns, and an instruction beside its answer.
_OF_CONVERSATIONS = ("system", "tools", "chat_template_kwargs")
_HISTORY = "history"
# Columns that change what a record means. A row that has one which its format does not use is refused.
_MEANINGFUL = (
    *_OF_CONVERSATIONS,
    *(_HISTORY, "system_prompt", "functions", "documents", "context", "input", "choices", "options"),
    *("image", "images", "video", "videos", "audio", "audios"),
)
# Every name that --columns can give to a column.
ROLES = tuple(dict.fromkeys([*(name for needed in FORMATS.values() for name in needed), *_MEANINGFUL, "task"]))


@dataclass(frozen=True)
class TextRecord:
    """One record as text.

    `conversation` is JSON, {"messages": [...], "tools": [...], "options": {...}, "is_pair": true} with the last three
    where there are any, and where turns were made of a prompt and an answer; it is "" for those as they are.
    """

    prompt: str
    completion: str
    conversation: str = ""


def describe_formats() -> str:
    """The accepted formats with their columns, for messages."""
    return ", ".join(f"{name} ({', '.join(columns)})" for name, columns in FORMATS.items())


def parse_columns(text: str | None) -> tuple[tuple[str, str], ...]:
    """(name here, name in the data) of "prompt=question,completion=answer"; a name without a column leaves it out.

    Raises:
        UserError: another form, or a name that no format has.
    """
    pairs = [pair.partition("=") for pair in (text or "").split(",") if pair.strip()]
    for role, sign, _ in pairs:
        if not sign or role.strip() not in ROLES:
            raise UserError(
                f"--columns {text}: expected NAME=COLUMN,NAME=COLUMN where NAME is one of {', '.join(ROLES)}"
            )
    return tuple((role.strip(), column.strip()) for role, _, column in pairs)


def present_columns(row: dict[str, Any], renamed: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Those pairs of `parse_columns` whose column a row has, and those that leave one out."""
    return tuple((name, column) for name, column in renamed if not column or column in row)


def rename_columns(row: dict[str, Any], renamed: Iterable[tuple[str, str]], where: str | None = None) -> dict[str, Any]:
    """A row by the names of `parse_columns`.

    Args:
        where: the data set, whose first row this is: each of the columns must be there.

    Raises:
        UserError: a column is not there.
    """
    pairs = dict(renamed)
    missing = [column for column in pairs.values() if column and column not in row]
    if missing and where is not None:
        raise UserError(f"{where}: --columns names the column {missing[0]!r} (found: {', '.join(row)}); correct it")
    others = {name: value for name, value in row.items() if name not in pairs and name not in pairs.values()}
    return {name: row.get(column) for name, column in pairs.items() if column} | others


def detect_format(columns: Iterable[str], wanted: str, where: str) -> str:
    """The format of a data set from its columns, or `wanted` if that is not "auto" and its columns are there.

    Raises:
        UserError: no format fits the columns, or the wanted one misses some.
    """
    found = list(columns)
    listed = ", ".join(found) or "none"
    if wanted == "auto":
        for name, needed in FORMATS.items():
            if set(needed) <= set(found):
                return name
        raise UserError(
            f"{where}: no known columns (found: {listed}); accepted formats: {describe_formats()}; rename the columns"
        )
    if wanted not in FORMATS:
        raise UserError(f"dataset_format {wanted!r} is not known; choose auto, {', '.join(FORMATS)}")
    missing = [column for column in FORMATS[wanted] if column not in found]
    if missing:
        raise UserError(
            f"{where}: dataset_format {wanted} needs the column {missing[0]!r} (found: {listed}); "
            f"rename the columns or choose another of: {describe_formats()}"
        )
    return wanted


def used_columns(data_format: str, is_conversation: bool) -> set[str]:
    """The columns that reach the trained text, and `task`.

    Args:
        data_format: a key of `FORMATS`.
        is_conversation: a chat template writes the rows.
    """
    used = {*FORMATS[data_format], *_OPTIONAL.get(data_format, ()), "task"}
    if is_conversation and data_format != "text":
        used.update(_OF_CONVERSATIONS)
        if data_format not in ("messages", "sharegpt"):
            used.add(_HISTORY)
    return used


def to_text(row: dict[str, Any], data_format: str, where: str, is_conversation: bool) -> TextRecord:
    """Write one row as a conversation, or as prompt and answer.

    A missing or null answer becomes "" (the record is dropped and counted later); a missing prompt is an error.

    Args:
        row: one record of the data set.
        data_format: a key of `FORMATS`.
        where: file and row number, for messages.
        is_conversation: a chat template writes the row; else its columns follow each other as they are.

    Raises:
        UserError: a column holds something else than text, turns are not as `turns.read_turns` expects them, or the
            row has a column whose meaning would be lost.
    """
    used = used_columns(data_format, is_conversation)
    for column in _MEANINGFUL:
        if column not in used and not is_empty(row.get(column)):
            raise UserError(
                f"{where}: column {column!r} would be lost, {_why_lost(data_format, column, is_conversation)}; "
                f"or leave it out with --columns {column}="
            )
    if data_format == "text":
        return TextRecord("", _text(row, "text", where, optional=True))
    if data_format in ("messages", "sharegpt"):
        (column,) = FORMATS[data_format]
        return _conversation(row, read_turns(row.get(column), column, where), where)
    asked, answered = FORMATS[data_format]
    if is_conversation and isinstance(row.get(asked), list) and isinstance(row.get(answered), list):
        return _conversation(row, _turns_of_a_pair(row, asked, answered, where), where)
    question, answer = _text(row, asked, where), _text(row, answered, where, optional=True)
    given = _text(row, "input", where, optional=True) if "input" in used else ""
    prompt = f"{question}\n\n{given}" if given.strip() else question
    if not is_conversation:
        return TextRecord(prompt, answer)
    user = {"role": "user", "content": prompt}
    if given.strip():
        user |= {"instruction": question, "input": given}  # Alpaca's template writes them apart
    turns = [*read_history(row.get(_HISTORY), where), user, {"role": "assistant", "content": answer}]
    return _conversation(row, turns, where, is_pair=True)


def _turns_of_a_pair(row: dict[str, Any], asked: str, answered: str, where: str) -> list[dict[str, Any]]:
    """A prompt of turns and a completion of turns, of which the completion's are learned."""
    given = [
        turn | ({"weight": 0} if turn["role"] == "assistant" else {}) for turn in read_turns(row[asked], asked, where)
    ]
    return [*given, *read_turns(row[answered], answered, where)]


def _why_lost(data_format: str, column: str, is_conversation: bool) -> str:
    if not is_conversation and column in used_columns(data_format, is_conversation=True):
        return "since no chat template writes the rows; give --prompt_template chat, alpaca or a file"
    return f"the format {data_format} does not use it; rename it with --columns"


def _conversation(row: dict[str, Any], turns: list[dict[str, Any]], where: str, is_pair: bool = False) -> TextRecord:
    system = _text(row, "system", where, optional=True)
    if system.strip():
        if turns[0]["role"] == "system":
            raise UserError(f"{where}: a system turn and a column 'system'; drop one of them")
        turns = [{"role": "system", "content": system}, *turns]
    tools, options = read_tools(row.get("tools"), where), read_options(row.get("chat_template_kwargs"), where)
    whole = {"messages": turns} | ({"tools": tools} if tools else {}) | ({"options": options} if options else {})
    whole |= {"is_pair": True} if is_pair else {}
    return TextRecord("", "", json.dumps(whole, ensure_ascii=False))


def _text(row: dict[str, Any], column: str, where: str, optional: bool = False) -> str:
    value = row.get(column)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        kind = "missing" if value is None else f"{type(value).__name__} ({short(value)})"
        raise UserError(f"{where}: column {column!r} is {kind}, expected text; convert the column to strings")
    return value
