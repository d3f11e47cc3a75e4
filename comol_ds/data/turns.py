"""The turns of a conversation as chat templates expect them: text contents, parsed tool calls, no nulls.

What a row says of a turn is kept, or refused with the file and the row: nothing is turned into text by Python.
"""

from typing import Any

from comol_ds.errors import UserError
from comol_ds.text_files import parse_json

# ShareGPT's names of who speaks (`from`); data sets spell them in several ways.
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
# A turn that is one tool call, as JSON in its text.
_SHAREGPT_CALL = "function_call"
# What a call is, beside which stand its id and type.
_CALL = ("function", "name", "arguments")
_NO_TEXT = ("image", "images", "video", "videos", "audio", "audios")


def is_empty(value: Any) -> bool:
    """Whether a column or key says nothing."""
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def short(value: Any) -> str:
    """A value in a message, on one line."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_turns(value: Any, column: str, where: str) -> list[dict[str, Any]]:
    """The turns of a row, in the form of OpenAI (role, content) or of ShareGPT (from, value).

    Contents become one text each; tool calls become {"type": "function", "function": {"name", "arguments"}} with
    arguments parsed, as servers hand them to a template. A turn that is not to be trained keeps `weight` 0.

    Args:
        value: the column's value.
        column: its name, for messages.
        where: file and row number, for messages.

    Raises:
        UserError: the value is no list of turns, or a turn holds something that is no text.
    """
    if not isinstance(value, list) or not value:
        raise UserError(
            f"{where}: column {column!r} is {type(value).__name__} ({short(value)}), "
            'expected a list of turns such as {"role": "user", "content": "..."}'
        )
    return [_turn(turn, f"{where}: turn {number} of {column!r}") for number, turn in enumerate(value, start=1)]


def _turn(given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise UserError(f'{where} is {short(given)}, expected {{"role": "user", "content": "..."}}')
    # Parquet fills the keys a turn does not have with nulls, which chat templates take for given values. transformers'
    # apply_chat_template drops them too, a null content beside tool calls among them, so serving writes the same.
    turn = {key: value for key, value in given.items() if value is not None}
    if "role" not in turn and "from" in turn and "value" in given:
        turn = _from_sharegpt(turn, where)
    if not isinstance(turn.get("role"), str):
        raise UserError(f'{where} is {short(given)}, expected {{"role": "user", "content": "..."}}')
    for key in _NO_TEXT:
        if not is_empty(turn.get(key)):
            raise UserError(f"{where} holds {key}; only text is trained, drop the record or the key")
    if "function_call" in turn:  # OpenAI's older spelling of one tool call
        turn["tool_calls"] = [*turn.get("tool_calls", []), turn.pop("function_call")]
    if is_empty(turn.get("tool_calls")):
        turn.pop("tool_calls", None)
    else:
        turn["tool_calls"] = _tool_calls(turn["tool_calls"], where)
    if "content" in turn or "tool_calls" not in turn:
        turn["content"] = _content(turn.get("content", ""), where)
    _check_weight(turn, where)
    return turn


def _from_sharegpt(turn: dict[str, Any], where: str) -> dict[str, Any]:
    speaker, value = turn.pop("from"), turn.pop("value", "")
    if speaker == _SHAREGPT_CALL:
        return {**turn, "role": "assistant", "tool_calls": _parsed(value, f"{where}, from {speaker!r},")}
    if speaker not in _SHAREGPT_ROLES:
        known = ", ".join([*_SHAREGPT_ROLES, _SHAREGPT_CALL])
        raise UserError(f"{where} is from {short(speaker)}; known: {known}; rename it")
    return {**turn, "role": _SHAREGPT_ROLES[speaker], "content": value}


def _content(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise UserError(f"{where} has the content {short(value)}, expected text; convert it to a string")
    for part in value:
        text = part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str) or part.get("type", "text") != "text":
            raise UserError(
                f'{where} has the part {short(part)}, expected {{"type": "text", "text": "..."}}; only text is trained'
            )
    return "".join(part["text"] for part in value)


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    calls = [value] if isinstance(value, dict) else value
    if not isinstance(calls, list):
        raise UserError(f"{where} has the tool_calls {short(value)}, expected a list of calls")
    return [_tool_call(call, where) for call in calls]


def _tool_call(given: Any, where: str) -> dict[str, Any]:
    call = given.get("function", given) if isinstance(given, dict) else given
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise UserError(
            f"{where} has the tool call {short(given)}, expected "
            '{"function": {"name": "...", "arguments": {...}}}'
        )
    arguments = call.get("arguments")
    arguments = {} if is_empty(arguments) else _parsed(arguments, f"{where}, the arguments of {call['name']!r}:")
    outer = {key: value for key, value in given.items() if key not in _CALL and value is not None}
    return {**outer, "type": "function", "function": {"name": call["name"], "arguments": arguments}}


def _check_weight(turn: dict[str, Any], where: str) -> None:
    """OpenAI's `weight`: 0 is not trained, 1 is; no other value has a meaning."""
    weight = turn.pop("weight", 1)
    if weight not in (0, 1):
        raise UserError(f"{where} has weight {short(weight)}; 0 (not trained) and 1 are known")
    if weight == 0:
        turn["weight"] = 0


def read_tools(value: Any, where: str) -> list[dict[str, Any]]:
    """The tools that a conversation may call, each as {"type": "function", "function": {"name", ...}}.

    Args:
        value: a list of schemas, or of schemas as JSON, or all of it as JSON; nothing at all is no tool.
        where: file and row number, for messages.

    Raises:
        UserError: no list, or a tool without a name.
    """
    if is_empty(value):
        return []
    tools = _parsed(value, f"{where}: column 'tools'")
    if not isinstance(tools, list):
        raise UserError(f"{where}: column 'tools' is {short(value)}, expected a list of tools")
    read = []
    for tool in (_parsed(item, f"{where}: column 'tools'") for item in tools):
        schema = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(schema, dict) or not isinstance(schema.get("name"), str):
            raise UserError(
                f'{where}: column \'tools\' holds {short(tool)}, expected {{"name": "...", "parameters": {{...}}}}'
            )
        read.append({"type": "function", "function": schema})
    return read


def read_options(value: Any, where: str) -> dict[str, Any]:
    """A row's own variables of the chat template, such as {"enable_thinking": false}.

    Raises:
        UserError: no object.
    """
    options = {} if is_empty(value) else _parsed(value, f"{where}: column 'chat_template_kwargs'")
    if not isinstance(options, dict):
        raise UserError(f"{where}: column 'chat_template_kwargs' is {short(value)}, expected an object")
    return options


def read_history(value: Any, where: str) -> list[dict[str, Any]]:
    """The earlier rounds of an instruction record, [[question, answer], ...], as turns.

    Raises:
        UserError: no list of pairs of texts.
    """
    rounds = [] if is_empty(value) else value
    if not isinstance(rounds, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in rounds
    ):
        raise UserError(f"{where}: column 'history' is {short(value)}, expected a list of [question, answer]")
    return [
        {"role": role, "content": text}
        for pair in rounds
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _parsed(value: Any, what: str) -> Any:
    """JSON as a value; what is no text is a value already."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except ValueError as error:
        raise UserError(f"{what} {short(value)} is no JSON; write an object") from error
