"""What the commands do about their terminal."""

import os
import sys


def never_ask() -> None:
    """Answer whatever asks on the terminal with an end of file.

    Libraries ask: transformers whether to run a model's code, wandb who the user is. In a job of many ranks nobody is
    there to answer, and what waits for an answer hangs.
    """
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115 - for the life of the process
