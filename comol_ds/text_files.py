"""JSON and YAML files that somebody else wrote, read within bounds that no honest file meets."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from comol_ds.errors import UserError, one_line

# The largest honest file, the index of a checkpoint with 90,000 tensors, has 8 MB.
MAX_FILE_BYTES = 64 * 2**20
# YAML is written by hand, and PyYAML reads 0.3 MB a second.
_MAX_YAML_BYTES = 2**20

_YAML = "tag:yaml.org,2002:"
_PLAIN_TAGS = {_YAML + kind for kind in ("str", "int", "float", "bool", "null", "timestamp")}


def parse_json(text: str | bytes, unique_keys: bool = False) -> Any:
    """`json.loads` whose every fault is a ValueError.

    Args:
        text: as for json.loads.
        unique_keys: refuse an object that has a key twice, of which json.loads silently takes the last.

    Raises:
        ValueError: not JSON (`json.JSONDecodeError`), not UTF-8 (UnicodeDecodeError), nested more deeply than Python
            recurses, or a whole number with more digits than Python converts.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique if unique_keys else None)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: Path, unique_keys: bool = False) -> Any:
    """`parse_json` of a UTF-8 file.

    Raises:
        OSError: it cannot be read.
        ValueError: as `parse_json`, or more than `MAX_FILE_BYTES`.
    """
    return parse_json(_read(path, MAX_FILE_BYTES).decode("utf-8-sig"), unique_keys)


def read_json_settings(path: str, flag: str, example: str) -> Any:
    """The content of a JSON file that the user wrote and named with a flag.

    Args:
        path: of the file.
        flag: that named it, for messages.
        example: what helps someone whose path is wrong.

    Raises:
        UserError: unreadable, not JSON (with the line), or an object has a key twice.
    """
    try:
        return read_json(Path(path), unique_keys=True)
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}; {example}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} {path} is not UTF-8 text (byte {error.start}); convert the file") from error
    except ValueError as error:
        reason = f"line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else error
        raise UserError(f"{flag} {path} is not valid JSON: {reason}; repair the file") from error


class _Loader(yaml.SafeLoader):
    """Without merge keys, which multiply what they are given; a plain alias is one object in several places."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        pass


def read_yaml(path: Path) -> Any:
    """A YAML file with the types that it gives its values.

    Raises:
        OSError: it cannot be read.
        ValueError: not YAML, nested more deeply than Python recurses, a merge key, or more than `_MAX_YAML_BYTES`.
    """
    try:
        return yaml.load(_read(path, _MAX_YAML_BYTES), Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(one_line(error)) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_yaml_words(path: str, flag: str) -> dict[str, Any]:
    """A YAML file of one key a line, its values as the words that a command line would have.

    A value is a word, a list of words, or None for null. Words are not converted: `010` stays "010" and a date a date.
    Aliases are not followed into anything that is no word, so they cannot grow.

    Raises:
        UserError: unreadable, not YAML (with the line), a key twice, a tag, or a value of another shape.
    """
    where = f"{flag} {path}"
    try:
        root = yaml.compose(_read(Path(path), _MAX_YAML_BYTES).decode("utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text (byte {error.start}); convert the file") from error
    except RecursionError as error:
        raise UserError(f"{where} is nested too deeply; write 'flag: value' lines") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{where} is not valid YAML, repair it: {one_line(error)}") from error
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{where} must hold 'flag: value' lines, found a {_kind(root)}")
    words: dict[str, Any] = {}
    for key, value in root.value:
        line = f"{where} line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{line}: a {_kind(key)} in place of a flag; write 'flag: value' lines")
        if key.value in words:
            raise UserError(f"{line}: {key.value} is given twice; remove one of the lines")
        words[key.value] = _words(value, f"{line}: {key.value}")
    return words


def _words(node: yaml.Node, where: str) -> str | list[str] | None:
    if isinstance(node, yaml.SequenceNode):
        items = [_word(item, f"{where} has an item that") for item in node.value]
        if None in items:
            raise UserError(f"{where} has an item that is null; give it a value or remove it")
        return items
    return _word(node, where)


def _word(node: yaml.Node, where: str) -> str | None:
    if not isinstance(node, yaml.ScalarNode):
        raise UserError(f"{where} is a {_kind(node)}; give one value")
    if node.tag not in _PLAIN_TAGS:
        raise UserError(f"{where} has the tag {node.tag!r}; give the value alone")
    if node.tag == _YAML + "null":
        return None
    if node.tag == _YAML + "bool":  # on, off, yes, no
        return str(yaml.SafeLoader.bool_values[node.value.lower()]).lower()
    if node.tag == _YAML + "float":  # YAML's .inf and .nan are Python's without the dot
        return str(node.value).lower().replace(".inf", "inf").replace(".nan", "nan")
    return str(node.value)


def _kind(node: yaml.Node) -> str:
    return {"scalar": "value", "sequence": "list", "mapping": "dict"}[node.id]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"{counts.most_common(1)[0][0]!r} is given twice")
    return values


def _read(path: Path, limit: int) -> bytes:
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"it has more than {limit // 2**20} MiB")
    return content
