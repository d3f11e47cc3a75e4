"""A name of another library that we rely on, and how that is checked."""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Check = Callable[[Any, str], str | None]  # (owner, name) -> what is wrong with it


@dataclass(frozen=True)
class Row:
    """A name that we rely on.

    Attributes:
        owner: dotted name of what has it: a module, class or function.
        name: an attribute of the owner, or what its source sets or reads.
        check: what we rely on.
    """

    owner: str
    name: str
    check: Check

    def __str__(self) -> str:
        return f"{self.owner}.{self.name}"


def called(positional: int, *keywords: str) -> Check:
    """Can be called with so many positional arguments (self counts), and names these keywords."""

    def check(owner: Any, name: str) -> str | None:
        signature = inspect.signature(getattr(owner, name))
        try:
            signature.bind(*range(positional), **dict.fromkeys(keywords))
        except TypeError as error:
            return f"has the signature {signature}: {error}"
        unnamed = [keyword for keyword in keywords if keyword not in signature.parameters]
        return f"has the signature {signature} without {', '.join(unnamed)}" if unnamed else None

    return check


def taking(*parameters: str) -> Check:
    """Has exactly these parameters: we override it, or hand them on."""

    def check(owner: Any, name: str) -> str | None:
        found = tuple(inspect.signature(getattr(owner, name)).parameters)
        return None if found == parameters else f"takes {', '.join(found)} and not {', '.join(parameters)}"

    return check


def parameter(owner: Any, name: str) -> str | None:
    """The owner has a parameter of this name."""
    signature = inspect.signature(owner)
    return None if name in signature.parameters else f"is missing in the signature {signature}"


def a(kind: Any) -> Check:
    """Is an instance of a class."""

    def check(owner: Any, name: str) -> str | None:
        found = getattr(owner, name)
        return None if isinstance(found, kind) else f"is {found!r}, no {kind}"

    return check


def subclass_of(kind: type) -> Check:
    def check(owner: Any, name: str) -> str | None:
        found = getattr(owner, name)
        return None if isinstance(found, type) and issubclass(found, kind) else f"is {found!r}, no kind of {kind}"

    return check


def equal(value: Any) -> Check:
    def check(owner: Any, name: str) -> str | None:
        found = getattr(owner, name)
        return None if found == value else f"is {found!r} and not {value!r}"

    return check


def abstract(*methods: str) -> Check:
    """Is a class that demands exactly these methods of whoever derives from it."""

    def check(owner: Any, name: str) -> str | None:
        found = sorted(getattr(owner, name).__abstractmethods__)
        return None if found == sorted(methods) else f"demands {', '.join(found)}"

    return check


def holding(*entries: Any) -> Check:
    """Is a container that has these entries."""

    def check(owner: Any, name: str) -> str | None:
        lost = [entry for entry in entries if entry not in getattr(owner, name)]
        return f"has no {lost}" if lost else None

    return check


def that(does: Callable[[], bool]) -> Check:
    """Behaves as we take it to."""

    return lambda owner, name: None if does() else f"behaves otherwise, see {does.__name__}"


def entry(owner: Any, name: str) -> str | None:
    """The owner is a container that has it."""
    return None if name in owner else f"is none of {', '.join(owner)}"


def assigned(owner: Any, name: str) -> str | None:
    """Instances get an attribute of this name."""
    return None if re.search(rf"\.{name}(: [^=\n]+)? = ", _source(owner)) else "is set nowhere any more"


def read(owner: Any, name: str) -> str | None:
    """Code asks an object for an attribute of this name."""
    return None if re.search(rf"\.{name}\b(?! = )|[\"']{name}[\"']", _source(owner)) else "is read nowhere any more"


def _source(owner: Any) -> str:
    """Of a function itself; of a class the whole module, since inspect takes half a second to find a large class."""
    return inspect.getsource(inspect.getmodule(owner) if isinstance(owner, type) else owner)
