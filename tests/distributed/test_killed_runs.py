"""A rank is killed at random instants, half of them inside a save: the run goes on from its last commit, bit by bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from comol_ds.adapters.adapter_folder import read_adapter
from comol_ds.training.commit import damage_of
from comol_ds.training.resume import find_checkpoint
from tests.distributed.launching import REPOSITORY, SHARED_MEMORY, clean_environment, free_port, run_deepspeed
from tests.distributed.run_folders import json_lines
from tests.distributed.test_run_and_resume import arguments
from tests.tiny_models import save_tiny_model

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1800)]
TRAIN = REPOSITORY / "launch" / "train.py"


def ranks_below(pid: int) -> list[int]:
    """The descendants of a process that run the trainer, one per rank."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # ended meanwhile
        parents[int(status.parent.name)] = int(fields[1])
    below, found = {pid}, []
    for child in sorted(parents):
        ancestor = child
        while ancestor in parents and ancestor not in below:
            ancestor = parents[ancestor]
        if ancestor in below and f"{TRAIN}\0--local_rank" in _command(child):
            found.append(child)
    return found


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def wait_for(condition, process: subprocess.Popen, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < end, "the run does not get on"
        time.sleep(0.002)


def run_and_kill(words: list[str], out: Path, extensions: Path, inside_save: bool, draw: random.Random) -> bool:
    """Start the run, and kill one of its two ranks while it trains, or while a checkpoint is written.

    Returns:
        Whether it left an unfinished checkpoint.
    """
    port, log = free_port(), out.parent / "killed.log"
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2"]
    command = [*launcher, "--master_addr", "127.0.0.1", "--master_port", str(port), str(TRAIN), *words]
    old = set((out / "generations").glob("*")) if out.exists() else set()
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=clean_environment(extensions), cwd=REPOSITORY, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        )  # fmt: skip
    try:
        wait_for(lambda: set((out / "generations").glob("*")) - old, process)
        saves = draw.randint(1, 2)
        for _ in range(saves):
            wait_for(lambda: list((out / "checkpoints").glob("*.writing-*")), process)
            if _ + 1 < saves or not inside_save:
                wait_for(lambda: not list((out / "checkpoints").glob("*.writing-*")), process)
        time.sleep(draw.uniform(0, 0.05 if inside_save else 0.5))
        victim = draw.choice(ranks_below(process.pid))
        os.kill(victim, signal.SIGKILL)
        process.wait(timeout=120)
        assert process.returncode != 0
        return bool(list((out / "checkpoints").glob("*.writing-*")))
    except AssertionError as error:
        raise AssertionError(f"{error}\n{log.read_text()[-3000:]}") from error
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        for leftover in SHARED_MEMORY.glob(f"deepspeed_*_{port}_*"):
            leftover.unlink(missing_ok=True)


@pytest.mark.parametrize(
    "kills", [pytest.param(3, marks=pytest.mark.slow), pytest.param(20, marks=pytest.mark.exhaustive)]
)
def test_a_run_that_is_killed_again_and_again_ends_as_the_uninterrupted_one(kills, tmp_path, extensions, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model, draw = save_tiny_model(tmp_path / "model"), random.Random(6)
    steps = 30 + 10 * kills  # more than are trained before the last of them
    changes = {"max_steps": steps, "save_steps": 3, "report_to": "none", "save_total_limit": 2}
    run = run_deepspeed(2, TRAIN, arguments(model, tmp_path / "through", **changes), extensions, timeout=900)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    out = tmp_path / "out"
    words = arguments(model, out, "--resume_from_checkpoint", **changes)
    reached, inside_save = [], 0
    for number in range(kills):
        inside_save += run_and_kill(words, out, extensions, inside_save=number % 2 == 0, draw=draw)
        found, _ = find_checkpoint("latest", out / "checkpoints")
        assert found is None or damage_of(found) is None
        reached.append(0 if found is None else int(found.name.removeprefix("step_")))
    assert reached == sorted(reached) and 0 < reached[-1] < steps
    assert inside_save >= kills // 4
    run = run_deepspeed(2, TRAIN, words, extensions, timeout=900)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    assert f"step_{reached[-1]}: step {reached[-1]} of {steps}, by DeepSpeed's own files" in run.stdout
    expected, found = (json_lines(folder / "metrics.jsonl") for folder in (tmp_path / "through", out))
    bits = [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in expected]
    assert [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in found] == bits
    expected, found = (read_adapter(folder / "adapter")[1] for folder in (tmp_path / "through", out))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not list((out / "checkpoints").glob("*.*")), "what the killed runs left is gone"
