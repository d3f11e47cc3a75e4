"""A base model's configuration, and its modules without weights, from files that somebody else wrote.

Whatever transformers raises at them becomes one line. A model's own code runs only if the user has asked for it, and
no call asks on the terminal: transformers does where ``trust_remote_code`` is left out.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from comol_ds.errors import UserError, one_line

T = TypeVar("T")

# More than any model has; transformers would build them one by one.
_MOST = {"layer": 10_000, "expert": 100_000}

# for commands that have no --trust_remote_code
NO_OWN_CODE = "use a model of a type that transformers knows, or load it in Python with trust_remote_code=True"
_ATTENTIONS = ("sdpa", "eager")  # the faster one first; every other one needs a package


@contextmanager
def told(where: str, remedy: str, own_code: str = "read it, and give --trust_remote_code to run it") -> Iterator[None]:
    """Any error inside becomes a `UserError`; what transformers and its tokenizers raise has no common base.

    Args:
        where: the flag or file that is read.
        remedy: what the user can do, told before the reason, which may be long.
        own_code: what to do about a model that brings its own code.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise UserError(f"{where} brings its own code, which is not run unasked; {own_code}") from error
        reason = one_line(error, limit=300) or type(error).__name__
        raise UserError(f"{where} cannot be read; {remedy}: {reason}") from error


def read_base_config(path: str, trust_remote_code: bool, where: str, **told_options: str) -> PretrainedConfig:
    """The configuration in a model folder or under a hub name.

    Args:
        path: of the model.
        trust_remote_code: whether code that lies beside the configuration may run.
        where, told_options: see `told`.

    Raises:
        UserError: no such model, a configuration that transformers cannot read, or numbers that no model has.
    """
    with told(where, **{"remedy": "check its config.json"} | told_options):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        _check_numbers(config.to_dict(), where)
    return config


def build_base(
    config: PretrainedConfig,
    trust_remote_code: bool,
    where: str,
    attn_implementation: str | None = None,
    **options: Any,
) -> PreTrainedModel:
    """The causal language model of a configuration, on the device and with the initialization of the caller's context.

    Args:
        attn_implementation: how it attends; None: as transformers chooses.
        options: of from_config, such as dtype.

    Raises:
        UserError: transformers has no such model, does not build it with these numbers, or not with this attention:
            another one that it builds is named.
    """

    def build(attention: str | None) -> PreTrainedModel:
        return AutoModelForCausalLM.from_config(
            config, trust_remote_code=trust_remote_code, attn_implementation=attention, **options
        )

    with told(where, "check its config.json"):
        try:
            return build(attn_implementation)
        except Exception as error:
            other = next((name for name in _ATTENTIONS if name != attn_implementation and _works(build, name)), None)
            if attn_implementation is None or other is None:
                raise
            raise UserError(
                f"--attn_implementation {attn_implementation} cannot be used with this model here, give"
                f" --attn_implementation {other}: {one_line(error, limit=300)}"
            ) from error


def _works(build: Callable[[str | None], PreTrainedModel], attention: str) -> bool:
    try:
        build(attention)
    except Exception:  # whatever the model's code raises
        return False
    return True


def build_here(build: Callable[[str], T], attn_implementation: str) -> T:
    """What ``build`` makes with a run's attention on a machine that may have neither its GPU nor its package.

    In the place of flash_attention_2 stands sdpa, or eager for a model that has no sdpa, such as Gemma 2.
    """
    if attn_implementation != "flash_attention_2":
        return build(attn_implementation)
    faster, other = _ATTENTIONS
    with suppress(Exception):  # whatever the model's code raises
        return build(faster)
    return build(other)


def has_own_code(config: PretrainedConfig) -> bool:
    """Whether a configuration that was read is of a class that came with the model, which the user has then allowed."""
    return type(config).__module__.startswith("transformers_modules.")


def read_generation_config(path: str, where: str) -> GenerationConfig | None:
    """The model's settings for generation, if it has any.

    Raises:
        UserError: its generation_config.json cannot be read.
    """
    with told(where, "repair or remove its generation_config.json"):
        try:
            return GenerationConfig.from_pretrained(path)
        except OSError as error:
            if isinstance(error.__context__, json.JSONDecodeError | UnicodeDecodeError):  # the file is there
                raise
            return None


def _check_numbers(values: Any, where: str, name: str = "") -> None:
    """Refuse counts for which building the model would take hours."""
    for key, value in values.items() if isinstance(values, dict) else ():
        for word, most in _MOST.items():
            is_count = word in str(key) and "size" not in str(key)  # Gemma 3n: vocab_size_per_layer_input
            if is_count and type(value) is int and value > most:
                found = f"{name}{key} in its config.json is {value}"
                raise UserError(f"{where}: {found}, more than any model has; repair it")
        _check_numbers(value, where, f"{name}{key}.")
