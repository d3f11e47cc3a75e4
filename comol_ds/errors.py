"""The one exception that means "the user can fix this", and how another error becomes a part of its line."""


class UserError(ValueError):
    """Bad configuration or input: one line that names the value and the remedy.

    Entry points print it without a traceback and exit with code 2, before any rank starts training.
    """


def one_line(error: Exception, limit: int | None = None) -> str:
    """An error's text without its line breaks, cut after ``limit`` characters."""
    return " ".join(str(error).split())[:limit]
