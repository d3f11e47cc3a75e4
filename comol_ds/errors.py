"""The one exception that means "the user can fix this", and how an error or a value becomes a part of its line."""

import reprlib


class UserError(ValueError):
    """Bad configuration or input: one line that names the value and the remedy.

    Entry points print it without a traceback and exit with code 2, before any rank starts training.
    """


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 100


def shown(value: object) -> str:
    """A value as Python writes it, cut: a file may hold anything."""
    return _REPR.repr(value)


def one_line(error: object, limit: int | None = None) -> str:
    """A text, or an error's, without its line breaks, cut after ``limit`` characters."""
    text = " ".join(str(error).split())
    return text if limit is None or len(text) <= limit else f"{text[:limit]} ..."
