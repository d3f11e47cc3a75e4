"""Starting real ranks with a time limit, and leaving nothing behind."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED_MEMORY = Path("/dev/shm")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def clean_environment(extensions: Path) -> dict[str, str]:
    """The environment of a launched run: own compiled ops, one thread per rank, no launcher's variables."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return inherited | {
        "TORCH_EXTENSIONS_DIR": str(extensions),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(REPOSITORY),
    }


def run_deepspeed(
    ranks: int, script: Path, arguments: list[str], extensions: Path, timeout: float = 240, cwd: Path = REPOSITORY
) -> subprocess.CompletedProcess:
    """Run ``deepspeed --num_accelerators ranks script arguments``; output is captured, errors are the caller's."""
    port = free_port()
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks)]
    command = [*launcher, "--master_addr", "127.0.0.1", "--master_port", str(port), str(script), *arguments]
    return run_limited(command, clean_environment(extensions), timeout, cwd, port)


def run_limited(
    command: list[str], environment: dict[str, str], timeout: float, cwd: Path, port: int
) -> subprocess.CompletedProcess:
    """Run a command in its own session; past the time limit end all of it, and always its shared-memory files."""
    process = subprocess.Popen(
        command, env=environment, cwd=cwd, text=True, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
        raise AssertionError(f"no end after {timeout} s: {command}\n{output[-3000:]}\n{errors[-3000:]}") from None
    finally:
        # DeepSpeed's CPU communication leaves two 69 MB files per rank and port
        for leftover in SHARED_MEMORY.glob(f"deepspeed_*_{port}_*"):
            leftover.unlink(missing_ok=True)
    return subprocess.CompletedProcess(command, process.returncode, output, errors)
