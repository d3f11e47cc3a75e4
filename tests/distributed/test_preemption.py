"""Runs that are asked to stop: all ranks save after one step and end with 75; the next start ends as if never stopped.

Ranks are plain processes with SLURM's variables, as srun starts them, where their own exit codes matter.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from comol_ds.adapters.adapter_folder import read_adapter
from comol_ds.checkpoint_names import by_step, step_of
from comol_ds.training.commit import damage_of, fault_of
from tests.distributed.launching import REPOSITORY, SHARED_MEMORY, clean_environment, free_port
from tests.distributed.run_folders import json_lines
from tests.distributed.test_killed_runs import ranks_below
from tests.distributed.test_run_and_resume import arguments
from tests.tiny_models import save_tiny_model

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]
TRAIN = REPOSITORY / "launch" / "train.py"
STEPS = 40
CHANGES = {
    "max_steps": STEPS, "save_steps": 1000, "report_to": "none", "max_generate_records": 0, "max_eval_records": 4,
}  # fmt: skip
PAIRS = {"tensor_parallel_size": 2, "ds_config": REPOSITORY / "ds_configs" / "zero1.json"}


@dataclass
class Started:
    """Processes that train: the ranks themselves, or one launcher."""

    processes: list[subprocess.Popen]
    log: Path

    def wait(self, seconds: float = 200) -> list[int]:
        """Exit codes."""
        end = time.monotonic() + seconds
        try:
            return [process.wait(max(0.1, end - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"no end after {seconds} s\n{self.printed[-3000:]}") from error

    @property
    def printed(self) -> str:
        return self.log.read_text()


@contextmanager
def started(commands: list[list[str]], variables: list[dict], log: Path, extensions: Path, port: int) -> Iterator:
    """Start processes whose output goes to one file; end them in any case."""
    processes = []
    try:
        with log.open("w") as output:
            for command, own in zip(commands, variables, strict=True):
                process = subprocess.Popen(
                    command, env=clean_environment(extensions) | own, cwd=REPOSITORY, start_new_session=True,
                    stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                )  # fmt: skip
                processes.append(process)
        yield Started(processes, log)
    finally:
        for process in processes:
            with suppress(ProcessLookupError):  # a launcher may be gone before its ranks
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for leftover in SHARED_MEMORY.glob(f"deepspeed_*_{port}_*"):
            leftover.unlink(missing_ok=True)


def by_srun(ranks: int, words: list[str], log: Path, extensions: Path, **more: str):
    """One process per rank, as srun starts them."""
    port = free_port()
    shared = {"SLURM_NTASKS": str(ranks), "SLURM_JOB_ID": "17", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    own = [shared | more | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(ranks)]
    return started([[sys.executable, str(TRAIN), *words]] * ranks, own, log, extensions, port)


def by_launcher(name: str, words: list[str], log: Path, extensions: Path):
    """One launcher of two ranks."""
    port = free_port()
    launcher = {
        "deepspeed": ["deepspeed.launcher.runner", "--num_accelerators", "2", "--master_addr", "127.0.0.1"],
        "torchrun": ["torch.distributed.run", "--nproc_per_node", "2"],
    }[name]
    command = [sys.executable, "-m", *launcher, "--master_port", str(port), str(TRAIN), *words]
    return started([command], [{}], log, extensions, port)


def wait_until(condition: Callable[[], bool], run: Started, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not condition():
        ended = [process.poll() for process in run.processes]
        assert ended == [None] * len(ended), f"ended too early: {ended}\n{run.printed[-3000:]}"
        assert time.monotonic() < end, f"the run does not get on\n{run.printed[-3000:]}"
        time.sleep(0.005)


def trains(out: Path, steps: int = 3) -> Callable[[], bool]:
    """True once so many lines of metrics are written."""
    metrics = out / "metrics.jsonl"
    return lambda: metrics.exists() and metrics.read_text().count("\n") >= steps


def assert_saved(out: Path, run: Started, reason: str) -> int:
    """One committed, undamaged checkpoint, a line that names it and the reason, no adapter; returns its step."""
    (checkpoint,) = by_step(out / "checkpoints")
    assert fault_of(checkpoint) is None and damage_of(checkpoint) is None
    step = step_of(checkpoint)
    assert 0 < step < STEPS
    line = f"stopped after step {step} of {STEPS}: {reason}; saved {checkpoint}; continue with --resume_from_checkpoint"
    assert run.printed.count(line) == 1, run.printed[-3000:]
    assert "Traceback" not in run.printed
    assert not (out / "adapter").exists()
    assert json_lines(out / "metrics.jsonl")[-1]["step"] == step
    return step


def assert_same_end(expected: Path, found: Path) -> None:
    """The same logs, without gap or repeat, and the same adapter, bit by bit."""
    names = ("step", "loss", "grad_norm", "lr", "tokens")
    logs = [[tuple(line[n] for n in names) for line in json_lines(out / "metrics.jsonl")] for out in (expected, found)]
    assert logs[0] == logs[1]
    assert json_lines(expected / "evaluations.jsonl") == json_lines(found / "evaluations.jsonl")
    adapters = [read_adapter(out / "adapter")[1] for out in (expected, found)]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(adapters[1][name], tensor) for name, tensor in adapters[0].items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preemption")
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    save_tiny_model(folder / "model")
    yield folder
    del os.environ["HF_DATASETS_CACHE"]


@pytest.fixture(scope="module")
def through(folder, extensions):
    """Finished runs that nothing has stopped: two data-parallel ranks under ZeRO-3, evaluated after every 4th step."""
    words = arguments(folder / "model", folder / "through", **CHANGES, eval_steps=4)
    with by_srun(2, words, folder / "through.log", extensions) as run:
        assert run.wait() == [0, 0], run.printed[-3000:]
    return folder / "through"


def words_for(folder: Path, out: Path, *extra: str, **changes) -> list[str]:
    return arguments(folder / "model", out, "--resume_from_checkpoint", *extra, **CHANGES | changes)


def finish(ranks: int, words: list[str], log: Path, extensions: Path, step: int) -> None:
    """Start again after a stop, and reach the end."""
    with by_srun(ranks, words, log, extensions) as run:
        assert run.wait() == [0] * ranks, run.printed[-3000:]
    assert f"step_{step}: step {step} of {STEPS}, by DeepSpeed's own files" in run.printed


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_and_the_next_start_ends_the_same(folder, through, tmp_path, extensions):
    out, log = tmp_path / "out", tmp_path / "log"
    words = words_for(folder, out, eval_steps=4)
    with by_srun(2, words, log, extensions) as run:
        wait_until(trains(out), run)
        run.processes[1].send_signal(signal.SIGTERM)
        assert run.wait() == [75, 75], run.printed[-3000:]
    step = assert_saved(out, run, "SIGTERM on rank 1")
    finish(2, words, log, extensions, step)
    assert_same_end(through, out)


@pytest.mark.exhaustive
def test_tensor_and_data_parallel_ranks_agree_on_a_signal_to_the_last_of_them(folder, tmp_path, extensions):
    """2 x 2 ranks: the signal's data-parallel group holds ranks 1 and 3, the other one 0 and 2."""
    with by_srun(4, words_for(folder, tmp_path / "through", **PAIRS), tmp_path / "log", extensions) as run:
        assert run.wait(400) == [0] * 4, run.printed[-3000:]
    out, words = tmp_path / "out", words_for(folder, tmp_path / "out", **PAIRS)
    with by_srun(4, words, tmp_path / "log", extensions) as run:
        wait_until(trains(out), run)
        run.processes[3].send_signal(signal.SIGUSR1)
        assert run.wait() == [75] * 4, run.printed[-3000:]
    step = assert_saved(out, run, "SIGUSR1 on rank 3")
    finish(4, words, tmp_path / "log", extensions, step)
    assert_same_end(tmp_path / "through", out)


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGTERM, marks=pytest.mark.exhaustive),
        pytest.param(signal.SIGINT, marks=pytest.mark.exhaustive),
        pytest.param(signal.SIGUSR1, marks=pytest.mark.exhaustive),
        pytest.param(signal.SIGHUP, marks=pytest.mark.exhaustive),
    ],
    ids=lambda number: number.name,
)
def test_a_signal_to_all_ranks_stops_them(number, folder, through, tmp_path, extensions):
    out, log = tmp_path / "out", tmp_path / "log"
    words = words_for(folder, out, eval_steps=4)
    with by_srun(2, words, log, extensions) as run:
        wait_until(trains(out), run)
        for process in run.processes:
            process.send_signal(number)
        assert run.wait() == [75, 75], run.printed[-3000:]
    step = assert_saved(out, run, f"{number.name} on rank 0")
    finish(2, words, log, extensions, step)
    assert_same_end(through, out)


@pytest.mark.exhaustive
def test_an_evaluation_that_was_due_when_the_run_stopped_comes_first_in_the_next(folder, tmp_path, extensions):
    """Every step is evaluated but the one after which the run stops."""
    changes = {"eval_steps": 1, "max_steps": 12}
    words = arguments(folder / "model", tmp_path / "through", **CHANGES | changes)
    with by_srun(2, words, tmp_path / "log", extensions) as run:
        assert run.wait() == [0, 0], run.printed[-3000:]
    out = tmp_path / "out"
    words = words_for(folder, out, **changes)
    with by_srun(2, words, tmp_path / "log", extensions) as run:
        wait_until(trains(out, 2), run)
        (out / "STOP").touch()
        assert run.wait() == [75, 75], run.printed[-3000:]
    (checkpoint,) = by_step(out / "checkpoints")
    evaluated = [line["step"] for line in json_lines(out / "evaluations.jsonl")]
    assert evaluated == list(range(1, step_of(checkpoint)))
    with by_srun(2, words, tmp_path / "log", extensions) as run:
        assert run.wait() == [0, 0], run.printed[-3000:]
    assert_same_end(tmp_path / "through", out)


@pytest.mark.parametrize(
    ("launcher", "code"),
    [
        pytest.param("deepspeed", 75, marks=pytest.mark.exhaustive),
        pytest.param("torchrun", 1, marks=pytest.mark.exhaustive),
    ],
)
def test_a_stop_file_ends_a_launched_run(launcher, code, folder, through, tmp_path, extensions):
    """torchrun has one exit code for all that is not 0, and prints the ranks' own."""
    out, log = tmp_path / "out", tmp_path / "log"
    words = words_for(folder, out, eval_steps=4)
    with by_launcher(launcher, words, log, extensions) as run:
        wait_until(trains(out), run)
        (out / "STOP").touch()
        assert run.wait() == [code], run.printed[-3000:]
    if launcher == "torchrun":
        assert "exitcode  : 75" in run.printed
    step = assert_saved_by_launcher(out, run, f"file {out / 'STOP'}")
    assert not (out / "STOP").exists()
    finish(2, words, log, extensions, step)
    assert_same_end(through, out)


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param("deepspeed", marks=pytest.mark.exhaustive),
        pytest.param("torchrun", marks=pytest.mark.exhaustive),
    ],
)
def test_a_signal_to_the_launcher_of_the_ranks_reaches_them(launcher, folder, through, tmp_path, extensions):
    """Both launchers forward SIGTERM, wait 30 seconds, and end with 1."""
    out, log = tmp_path / "out", tmp_path / "log"
    words = words_for(folder, out, eval_steps=4)
    with by_launcher(launcher, words, log, extensions) as run:
        wait_until(trains(out), run)
        os.kill(parent_of_ranks(run.processes[0].pid), signal.SIGTERM)
        assert run.wait() == [1], run.printed[-3000:]
    step = assert_saved_by_launcher(out, run, "SIGTERM on rank 0")
    finish(2, words, log, extensions, step)
    assert_same_end(through, out)


@pytest.mark.exhaustive
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_ctrl_c_on_a_terminal_is_one_request_although_the_launcher_forwards_it(launcher, folder, tmp_path, extensions):
    """The command itself may be gone before its ranks have saved."""
    out, log = tmp_path / "out", tmp_path / "log"
    with by_launcher(launcher, words_for(folder, out), log, extensions) as run:
        wait_until(trains(out), run)
        os.killpg(run.processes[0].pid, signal.SIGINT)
        assert run.wait()[0] not in (0, 2, 75)
        end = time.monotonic() + 60
        while "continue with --resume_from_checkpoint" not in run.printed and time.monotonic() < end:
            time.sleep(0.1)
        assert_saved_by_launcher(out, run, "SIGINT on rank 0")


@pytest.mark.exhaustive
def test_the_time_budget_stops_a_run(folder, through, tmp_path, extensions):
    """The hours are over before the first step; every start trains one step all the same."""
    out, log = tmp_path / "out", tmp_path / "log"
    words = words_for(folder, out, eval_steps=4)
    with by_srun(2, [*words, "--max_hours", "0.0001"], log, extensions) as run:
        assert run.wait() == [75, 75], run.printed[-3000:]
    assert assert_saved(out, run, "--max_hours 0.0001 are over") == 1
    finish(2, words, log, extensions, 1)
    assert_same_end(through, out)


@pytest.mark.exhaustive
def test_the_end_of_the_slurm_job_stops_a_run_in_time(folder, tmp_path, extensions):
    """The job has an hour left, and the margin is two."""
    out, log = tmp_path / "out", tmp_path / "log"
    words = words_for(folder, out, stop_margin_minutes=120)
    with by_srun(2, words, log, extensions, SLURM_JOB_END_TIME=str(int(time.time()) + 3600)) as run:
        assert run.wait() == [75, 75], run.printed[-3000:]
    assert "stopped after step 1 of 40: the SLURM job ends in 5" in run.printed
    assert [step_of(path) for path in by_step(out / "checkpoints")] == [1]


@pytest.mark.exhaustive
def test_a_second_signal_ends_a_rank_that_waits_for_another_one(folder, tmp_path, extensions):
    """Rank 1 is frozen, so that rank 0 hangs in a collective and never comes to a step's end."""
    out = tmp_path / "out"
    with by_srun(2, words_for(folder, out), tmp_path / "log", extensions) as run:
        wait_until(trains(out), run)
        first, frozen = run.processes
        frozen.send_signal(signal.SIGSTOP)
        time.sleep(1)
        first.send_signal(signal.SIGTERM)
        time.sleep(3)
        assert first.poll() is None
        start = time.monotonic()
        first.send_signal(signal.SIGTERM)
        assert first.wait(10) == 128 + signal.SIGTERM
        assert time.monotonic() - start < 5
    assert "another SIGTERM or SIGINT ends it now" in run.printed
    assert not by_step(out / "checkpoints")


@pytest.mark.exhaustive
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_asked_while_it_is_set_up_trains_nothing_and_the_next_start_is_whole(ranks, folder, tmp_path, extensions):
    out, log = tmp_path / "out", tmp_path / "log"
    out.mkdir()
    (out / "STOP").touch()
    words = words_for(folder, out, max_steps=2)
    with by_srun(ranks, words, log, extensions) as run:
        assert run.wait() == [75] * ranks, run.printed[-3000:]
    assert f"stopped before a step: file {out / 'STOP'}; nothing was trained" in run.printed
    assert not by_step(out / "checkpoints") and not (out / "STOP").exists()
    with by_srun(ranks, words, log, extensions) as run:
        assert run.wait() == [0] * ranks, run.printed[-3000:]
    assert [line["step"] for line in json_lines(out / "metrics.jsonl")] == [1, 2]


def assert_saved_by_launcher(out: Path, run: Started, reason: str) -> int:
    """`assert_saved`, where a launcher's own report of exit codes may hold a traceback."""
    (checkpoint,) = by_step(out / "checkpoints")
    assert fault_of(checkpoint) is None and damage_of(checkpoint) is None
    step = step_of(checkpoint)
    assert f"stopped after step {step} of {STEPS}: {reason}; saved {checkpoint};" in run.printed, run.printed[-3000:]
    assert not (out / "adapter").exists()
    return step


def parent_of_ranks(launcher: int) -> int:
    """The process that started the ranks: deepspeed's is a child of the command, torchrun is it itself."""
    rank = ranks_below(launcher)
    if not rank:
        return launcher
    return int(Path(f"/proc/{rank[0]}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.slow
def test_a_frozen_rank_ends_the_run_and_is_named(folder, tmp_path, extensions):
    """The other rank hangs in a collective; it ends before the 30 seconds that --collective_timeout_minutes allows."""
    out = tmp_path / "out"
    words = [*words_for(folder, out), "--collective_timeout_minutes", "0.5"]
    with by_srun(2, words, tmp_path / "log", extensions) as run:
        wait_until(trains(out), run)
        first, frozen = run.processes
        frozen.send_signal(signal.SIGSTOP)
        assert first.wait(60) == 1
    assert "hung: no step for 27 s after step " in run.printed
    assert f"no sign of life from rank 1; stacks of the ranks in {out / 'stacks'}" in run.printed
    # the line that ended the wait is written between two collectives of a step
    assert re.search(r"in (train_step|log_step)$", (out / "stacks" / "rank_0.txt").read_text(), re.MULTILINE)
