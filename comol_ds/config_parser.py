"""Command line and YAML -> `RunConfig`. Defaults < YAML < flags; an unknown name is refused with the nearest one."""

import difflib
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NoReturn, get_args, get_origin

import yaml
from transformers import HfArgumentParser

from comol_ds.config import GROUPS, RunConfig
from comol_ds.errors import UserError, one_line


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
        UserError: unknown flag or YAML key (names the nearest), a value of the wrong type or out of range.
    """
    parser = _Parser(GROUPS, usage=_USAGE, allow_abbrev=False, description=_DESCRIPTION)
    known = {action.dest for action in parser._actions} - {"help", "local_rank"}  # what a user may set
    command_line, unknown = parser.parse_known_args(argv)
    for word in unknown:
        _refuse_unknown(word, known, "flag")
    weaker = dict(defaults or {})
    if command_line.config:
        weaker |= _read_yaml(command_line.config, known - {"config"})
    # One path for every source: YAML and defaults become flags in front of the real ones, and the last one wins.
    # Only null has no spelling on the command line.
    parser.set_defaults(**{name: None for name, value in weaker.items() if value is None})
    everything = [*_as_flags(weaker), *argv]
    config = RunConfig(*parser.parse_args_into_dataclasses(everything, look_for_args_file=False))
    config.check()
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
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    mark = "--" if kind == "flag" else ""
    raise UserError(f"unknown {kind} {mark}{name}; the nearest known name is {mark}{near}")


def _read_yaml(path: str, known: set[str]) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path} is not UTF-8 text (byte {error.start}); convert the file") from error
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"--config {path} is not valid YAML, repair it: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path} must hold 'flag: value' lines, found a {type(values).__name__}")
    for name, value in values.items():
        if name not in known:
            _refuse_unknown(str(name), known, "YAML key")
        _check_yaml_value(path, name, value)
    return values


def _check_yaml_value(path: str, name: str, value: Any) -> None:
    """Refuse what cannot be written as a flag; argparse checks the rest."""
    kinds = _FIELD_KINDS[name]
    if value is None and NoneType not in kinds:
        raise UserError(f"--config {path}: {name} is null; give it a value or remove the line")
    if isinstance(value, dict) or (isinstance(value, list) and list not in kinds):
        raise UserError(f"--config {path}: {name} is a {type(value).__name__}; give one value")


def _kinds(annotation: Any) -> set[Any]:
    """int -> {int}; list[str] | None -> {list, NoneType}."""
    options = get_args(annotation) if get_origin(annotation) is UnionType else [annotation]
    return {get_origin(option) or option for option in options}


_FIELD_KINDS = {field.name: _kinds(field.type) for group in GROUPS for field in fields(group)}


def _as_flags(values: dict[str, Any]) -> list[str]:
    """{"packing": True, "dataset": ["a", "b"]} -> ["--packing", "true", "--dataset", "a", "b"]; None is left out."""
    flags = []
    for name, value in values.items():
        if value is None:
            continue
        items = value if isinstance(value, (list, tuple)) else [value]
        flags.append(f"--{name}")
        flags.extend(str(item).lower() if isinstance(item, bool) else str(item) for item in items)
    return flags
