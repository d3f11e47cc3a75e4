"""How a record is written: from the columns of one row to one prompt and one answer, or to a list of chat turns."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from comol_ds.errors import UserError

# Columns each format needs, in the order of detection: the first whose columns are all there wins.
FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "question_answer": ("question", "answer"),
}

# The template of Stanford Alpaca (https://github.com/tatsu-lab/stanford_alpaca#data-release), closed by a newline so
# that an answer tokenized on its own starts a line.
ALPACA_PLAIN = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


@dataclass(frozen=True)
class TextRecord:
    """One record as text: `messages` is a JSON list of turns for the chat format and "" for the others."""

    prompt: str
    completion: str
    messages: str = ""


def describe_formats() -> str:
    """The accepted formats with their columns, for messages."""
    return ", ".join(f"{name} ({', '.join(columns)})" for name, columns in FORMATS.items())


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


def to_text(row: dict[str, Any], data_format: str, where: str) -> TextRecord:
    """Write one row as prompt and answer.

    A missing or null answer becomes "" (the record is dropped and counted later); a missing prompt is an error.

    Args:
        row: one record of the data set.
        data_format: a key of `FORMATS`.
        where: file and row number, for messages.

    Raises:
        UserError: a column holds something else than text, or `messages` is not a list of role and content.
    """
    if data_format == "messages":
        return TextRecord("", "", json.dumps(_turns(row.get("messages"), where), ensure_ascii=False))
    if data_format == "prompt_completion":
        return TextRecord(_text(row, "prompt", where), _text(row, "completion", where, optional=True))
    if data_format == "question_answer":
        # The question is put as an instruction, so that question/answer and alpaca data train one prompt style.
        prompt = ALPACA_PLAIN.format(instruction=_text(row, "question", where))
        return TextRecord(prompt, _text(row, "answer", where, optional=True))
    instruction, given = _text(row, "instruction", where), _text(row, "input", where, optional=True)
    template = ALPACA_WITH_INPUT if given.strip() else ALPACA_PLAIN
    return TextRecord(template.format(instruction=instruction, input=given), _text(row, "output", where, optional=True))


def _text(row: dict[str, Any], column: str, where: str, optional: bool = False) -> str:
    value = row.get(column)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        kind = "missing" if value is None else f"{type(value).__name__} ({_short(value)})"
        raise UserError(f"{where}: column {column!r} is {kind}, expected text; convert the column to strings")
    return value


def _turns(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise UserError(
            f"{where}: column 'messages' is {type(value).__name__} ({_short(value)}), "
            'expected a list of turns such as {"role": "user", "content": "..."}'
        )
    for turn in value:
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise UserError(
                f'{where}: a turn of \'messages\' is {_short(turn)}, expected {{"role": "user", "content": "..."}}'
            )
    # Parquet fills the keys a turn does not have with nulls, which chat templates take for given values.
    return [{key: item for key, item in turn.items() if item is not None} for turn in value]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
