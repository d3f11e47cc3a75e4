"""Command line and YAML -> `RunConfig`. Defaults < YAML < flags; an unknown name is refused with a hint."""

import argparse
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, NoReturn, get_args, get_origin

from transformers import HfArgumentParser

from comol_ds.config import GROUPS, RunConfig
from comol_ds.config_checks import check_config
from comol_ds.errors import UserError
from comol_ds.flag_aliases import unknown_name
from comol_ds.text_files import read_yaml_words


class _Parser(HfArgumentParser):
    """argparse that reports an error as one `UserError` line instead of usage text and exit."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def parse_run_config(argv: list[str], defaults: dict[str, Any] | None = None) -> RunConfig:
    """Parse the flags of launch/train.py.

    Args:
        argv: the arguments after the program's name.
        defaults: flag -> value, weaker than the YAML file and the command line.

    Raises:
        UserError: unknown flag or YAML key (see `unknown_name`), a value of the wrong type or out of range.
    """
    parser = _Parser(GROUPS, usage=_USAGE, allow_abbrev=False, description=_DESCRIPTION)
    known = {action.dest for action in parser._actions} - {"help", "local_rank"}  # what a user may set
    command_line, unknown = parser.parse_known_args(argv)
    for word in unknown:
        _refuse_unknown(word, known, "flag")
    weaker = dict(defaults or {})
    if command_line.config:
        weaker |= _read_yaml(command_line.config, known - {"config"})
    parser.set_defaults(**{name: _parsed(parser, name, value) for name, value in weaker.items()})
    config = RunConfig(*parser.parse_args_into_dataclasses(argv, look_for_args_file=False))
    check_config(config)
    return config


_USAGE = "deepspeed launch/train.py --ds_config DS_CONFIG [flags]"
_DESCRIPTION = (
    "Fine-tune a causal language model with CoMoL adapters under DeepSpeed ZeRO. "
    "Without --model_name_or_path and --dataset it trains the embedded demonstration."
)


def _refuse_unknown(word: str, known: set[str], kind: str) -> NoReturn:
    name = word.lstrip("-").split("=")[0].replace("-", "_")
    if not word.startswith("-") and kind == "flag":
        raise UserError(f"unexpected argument {word!r}; values follow their --flag")
    mark = "--" if kind == "flag" else ""
    raise UserError(f"unknown {kind} {mark}{name}; {unknown_name(name, known, mark)}")


def _read_yaml(path: str, known: set[str]) -> dict[str, Any]:
    values = read_yaml_words(path, "--config")
    for name, value in values.items():
        if name not in known:
            _refuse_unknown(name, known, "YAML key")
        kinds = _FIELD_KINDS[name]
        if value is None and NoneType not in kinds:
            raise UserError(f"--config {path}: {name} is null; give it a value or remove the line")
        if isinstance(value, list) and list not in kinds:
            raise UserError(f"--config {path}: {name} is a list; give one value")
        if value == []:
            raise UserError(f"--config {path}: {name} is an empty list; give it a value or remove the line")
    return values


def _kinds(annotation: Any) -> set[Any]:
    """int -> {int}; list[str] | None -> {list, NoneType}."""
    options = get_args(annotation) if get_origin(annotation) is UnionType else [annotation]
    return {get_origin(option) or option for option in options}


_FIELD_KINDS = {field.name: _kinds(field.type) for group in GROUPS for field in fields(group)}


def _parsed(parser: argparse.ArgumentParser, name: str, value: Any) -> Any:
    """The value of a YAML file or of the defaults as argparse reads it from a command line.

    Every word is read alone and behind an equals sign, where it is a value whatever it looks like: ``dataset:
    ["--seed", "7"]`` are two data sets.
    """
    if value is None:
        return None
    items = value if isinstance(value, list | tuple) else [value]
    words = [str(item).lower() if isinstance(item, bool) else str(item) for item in items]
    read = [getattr(parser.parse_known_args([f"--{name}={word}"])[0], name) for word in words]
    return [item for items in read for item in items] if list in _FIELD_KINDS[name] else read[0]
