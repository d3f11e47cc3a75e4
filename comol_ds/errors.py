"""The one exception that means "the user can fix this"."""


class UserError(ValueError):
    """Bad configuration or input: one line that names the value and the remedy.

    Entry points print it without a traceback and exit with code 2, before any rank starts training.
    """
