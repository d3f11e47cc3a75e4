"""Ranks on this machine, in processes of their own, with a time limit and nothing left behind."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import comol_ds

REPOSITORY = Path(comol_ds.__file__).resolve().parents[1]


def run_ranks(
    ranks: int, words: Sequence[str], what: str, limit_seconds: float, environment: Mapping[str, str] | None = None
) -> None:
    """Run ``deepspeed --num_accelerators ranks words...`` to its end.

    Args:
        words: script, or ``--module`` and module, and its arguments.
        what: what failed, if it fails.
        limit_seconds: after which all of it is ended.
        environment: variables besides those of this process.

    Raises:
        RuntimeError: the ranks failed, with the end of what they said.
        subprocess.TimeoutExpired: they did not end in time.
    """
    command = [
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks)),
        *("--master_addr", "127.0.0.1", "--master_port", str(_free_port()), *words),
    ]
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    ours = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command, env=os.environ | ours | (environment or {}), text=True, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=limit_seconds)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    if process.returncode:
        raise RuntimeError(f"{what} failed with exit code {process.returncode}:\n{said[-3000:]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
