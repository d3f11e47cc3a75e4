"""The regular expressions of an adapter's configuration, which may come from a folder that somebody else wrote.

PEFT matches them against the name of every module. An expression such as ``(a+)+b`` takes years for one name, and
Python's matcher has no time limit; so they are tried in a process that has one.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from comol_ds.errors import UserError, shown

_SECONDS = 10  # a thousandth of it is enough for the names of a model of any size
_PLAIN = re.compile(r"[\w.]*")  # nothing in it repeats

# field -> the function of re and the expression that PEFT makes of it (tuners_utils.check_target_module_exists and
# utils.get_pattern_key, as of 0.21)
_MATCHED = {
    "target_modules": ("fullmatch", "{}"),
    "exclude_modules": ("fullmatch", "{}"),
    "layers_pattern": ("match", r"(?:^|.*?\.){}\.(?P<idx>\d+)\."),
    "modules_to_save": ("match", r"(^|.*\.){}($|\..*)"),
    "rank_pattern": ("match", r"(.*\.)?({})$"),
    "alpha_pattern": ("match", r"(.*\.)?({})$"),
}
_NAMES_IF_LISTED = ("target_modules", "exclude_modules")

_TRIAL = """
import json, re, sys
trials, names = json.load(sys.stdin)
for function, expression in trials:
    try:
        matches = getattr(re.compile(expression), function)
    except (re.error, RecursionError, OverflowError):
        continue
    for name in names:
        matches(name)
"""


def check_matching_ends(settings: Any, names: Iterable[str]) -> None:
    """Refuse an expression that takes longer than some seconds to match against names of modules.

    Args:
        settings: has some of PEFT's fields that hold expressions, such as target_modules.
        names: of all modules.

    Raises:
        UserError: naming the field and the expression.
    """
    given = [pair for pair in _expressions(settings) if not _PLAIN.fullmatch(pair[1])]
    trials = [(_MATCHED[field][0], _MATCHED[field][1].replace("{}", expression)) for field, expression in given]
    endless = first_endless(trials, list(names))
    if endless is not None:
        field, expression = given[endless]
        raise UserError(
            f"{field} {shown(expression)} takes more than {_SECONDS} s to match against the model's module names;"
            " write a simpler expression, without repetitions inside repetitions"
        )


def first_endless(trials: Sequence[tuple[str, str]], names: list[str]) -> int | None:
    """Which expression is the first that takes longer than some seconds to match against all names; None if none is.

    All are tried in one process. Only where that does not end, each gets one of its own.

    Args:
        trials: for each expression the function of re, "match" or "fullmatch", and itself. What cannot be compiled
            ends at once.
        names: texts.
    """
    if not trials or _ends(trials, names):
        return None
    return next((place for place, trial in enumerate(trials) if len(trials) == 1 or not _ends([trial], names)), None)


def _ends(trials: Sequence[tuple[str, str]], names: list[str]) -> bool:
    given = json.dumps([trials, names])
    command = [sys.executable, "-I", "-S", "-c", _TRIAL]
    try:
        subprocess.run(command, input=given.encode(), timeout=_SECONDS, stderr=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return False
    return True


def _expressions(settings: Any) -> Iterator[tuple[str, str]]:
    for field in _MATCHED:
        value = getattr(settings, field, None)
        if isinstance(value, str):
            if value != "all-linear":
                yield field, value
        elif field not in _NAMES_IF_LISTED and isinstance(value, list | tuple | set | dict):
            yield from ((field, item) for item in value if isinstance(item, str))
