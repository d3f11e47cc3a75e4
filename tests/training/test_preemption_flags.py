"""What makes a rank ask to stop: signals, the clock, SLURM's word on the job's end; and what must not."""

import ctypes
import os
import pty
import signal
import sys
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from comol_ds.checkpoint_names import MARKER
from comol_ds.config import RunConfig, RunSettings
from comol_ds.config_checks import check_config
from comol_ds.errors import UserError
from comol_ds.parallel.groups import World, job_end_time
from comol_ds.training import preemption
from comol_ds.training.preemption import Clock, StopRequests, StopSignals


@pytest.fixture(autouse=True)
def not_under_nohup():
    """Whatever the tests were started by."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def signals():
    """Taken over for the test, given back afterwards."""
    taken = StopSignals()
    yield taken
    taken.restore()


def comes(condition) -> bool:
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_is_noted_and_nothing_else(number, signals):
    os.kill(os.getpid(), number)
    assert comes(lambda: signals.first == number.name)


def test_the_terminal_and_the_launcher_that_forwards_its_signal_are_one_request(signals):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(os.getpid(), number)
    assert comes(lambda: signals.first is not None)
    time.sleep(0.1)
    assert signals.first == "SIGINT"


def test_handlers_go_back_to_who_had_them():
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    taken = StopSignals()
    taken.restore()
    assert [signal.getsignal(number) for number in numbers] == before
    assert signal.set_wakeup_fd(-1) == -1


def stop_with_its_terminal(folder: Path) -> None:
    """Note what comes when the terminal goes, go on printing as a run that saves does, and leave word."""
    with StopRequests(folder, folder / "checkpoints", RunSettings(), World(0, 1, 0)) as requests:
        (folder / "ready").touch()
        came = comes(requests.came)
        print("saved", flush=True)
        print("saved", file=sys.stderr, flush=True)
        (folder / "reason").write_text(f"{came} {requests.reason}")


def test_a_run_whose_terminal_is_closed_saves_although_nobody_reads_what_it_prints(tmp_path):
    child, terminal = pty.fork()
    if child == 0:
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        stop_with_its_terminal(tmp_path)
        os._exit(0)
    assert comes((tmp_path / "ready").exists)
    os.close(terminal)
    assert os.waitpid(child, 0)[1] == 0
    assert (tmp_path / "reason").read_text() == "True SIGHUP on rank 0"


def test_under_nohup_a_closed_terminal_stops_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    taken = StopSignals()
    try:
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.1)
        assert taken.first is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert comes(lambda: taken.first == "SIGUSR1")
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        taken.restore()
        signal.signal(signal.SIGHUP, before)


def test_a_forked_process_ends_on_sigterm_and_does_not_tell_its_parent(signals):
    """datasets ends the processes that tokenize by SIGTERM."""
    child = get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    time.sleep(0.3)
    child.terminate()
    child.join(10)
    assert child.exitcode == -signal.SIGTERM
    time.sleep(0.1)
    assert signals.first is None


def read_in_c(one_request: float, ready: Connection, pipe: int) -> None:
    """Wait in a C function, as in a collective, until the pipe is closed."""
    preemption._ONE_REQUEST_SECONDS = one_request
    taken = StopSignals()
    ready.send(True)
    ctypes.CDLL(None).read(pipe, ctypes.create_string_buffer(1), 1)
    taken.ignore()


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [
        (signal.SIGTERM, signal.SIGTERM, 143),
        (signal.SIGINT, signal.SIGTERM, 143),
        (signal.SIGTERM, signal.SIGINT, 130),
        (signal.SIGUSR1, signal.SIGTERM, None),
    ],
)
def test_the_second_termination_ends_a_process_that_is_stuck_in_c(first, second, code):
    """SIGUSR1 warns of the end of a SLURM job, SIGTERM comes at the end: the save in between must go on."""
    context = get_context("fork")
    told, ready = context.Pipe(duplex=False)
    pipe, end = os.pipe()
    process = context.Process(target=read_in_c, args=(0.2, ready, pipe))
    process.start()
    try:
        assert told.poll(10)
        os.kill(process.pid, first)
        time.sleep(0.5)
        os.kill(process.pid, second)
        process.join(1)
        assert process.exitcode == code
        os.write(end, b"x")
        process.join(10)
        assert process.exitcode == (code or 0)
    finally:
        process.kill()
        os.close(pipe)
        os.close(end)


@pytest.fixture
def moments(monkeypatch):
    """A clock that the test sets: [seconds since the start, Unix time at the start]."""
    now = {"seconds": 0.0}
    monkeypatch.setattr(preemption.time, "monotonic", lambda: 100 + now["seconds"])
    monkeypatch.setattr(preemption.time, "time", lambda: 1_000_000 + now["seconds"])
    return now


def verdicts(clock: Clock, moments: dict, *seconds: float) -> list[str | None]:
    found = []
    for moment in seconds:
        moments["seconds"] = moment
        found.append(clock.verdict())
    return found


def test_without_limits_the_clock_never_stops(moments, tmp_path):
    assert verdicts(Clock(None, None, 300, tmp_path), moments, 1, 10**9) == [None, None]


def test_max_hours_count_from_the_start(moments, tmp_path):
    clock = Clock(0.5, None, 300, tmp_path)
    assert verdicts(clock, moments, 1799, 1800) == [None, "--max_hours 0.5 are over"]


def test_the_margin_before_the_job_ends_holds_the_longest_step(moments, tmp_path):
    """End after 1000 s, margin 300 s, steps of 50 s: at 650 s the next look would come at 700 s, which is too late."""
    clock = Clock(None, 1_001_000, 300, tmp_path)
    assert verdicts(clock, moments, 550, 600, 649) == [None, None, None]
    assert verdicts(clock, moments, 650) == ["the SLURM job ends in 5.8 minutes"]


def test_the_margin_grows_by_the_longest_save(moments, tmp_path):
    """Steps of 10 s; a save that starts at 100 s is seen as committed at 220 s: 1000 - 300 - 120 - 10 = 570."""
    clock = Clock(None, 1_001_000, 300, tmp_path)
    marker = tmp_path / "step_7" / MARKER
    verdicts(clock, moments, *range(0, 101, 10))
    clock.save_starts(7)
    verdicts(clock, moments, *range(110, 211, 10))
    marker.parent.mkdir()
    marker.touch()
    assert verdicts(clock, moments, *range(220, 561, 10)) == [None] * 35
    assert verdicts(clock, moments, 569, 570) == [None, "the SLURM job ends in 7.2 minutes"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_hours", 0.0, "--max_hours 0.0: must be positive"),
        ("max_hours", float("nan"), "--max_hours nan: must be positive"),
        ("stop_margin_minutes", -1.0, "--stop_margin_minutes -1.0: must not be negative"),
    ],
)
def test_limits_that_no_run_can_keep_are_refused(name, value, message):
    with pytest.raises(UserError) as caught:
        check_config(RunConfig(run=RunSettings(**{name: value})))
    assert str(caught.value) == message


@pytest.mark.parametrize(("value", "expected"), [(None, None), ("1732271400", 1732271400.0)])
def test_the_end_of_the_job_is_what_slurm_says(value, expected):
    assert job_end_time({} if value is None else {"SLURM_JOB_END_TIME": value}) == expected


def test_an_end_of_the_job_that_is_no_number_is_refused():
    with pytest.raises(UserError) as caught:
        job_end_time({"SLURM_JOB_END_TIME": "Unknown"})
    assert str(caught.value) == "SLURM_JOB_END_TIME is 'Unknown', not a Unix time; unset it"


def test_only_rank_0_looks_for_the_file_and_deletes_it(tmp_path):
    (tmp_path / "STOP").touch()
    came = []
    for rank in (1, 0):
        with StopRequests(tmp_path, tmp_path / "checkpoints", RunSettings(), World(rank, 2, rank)) as requests:
            came.append((requests.came(), requests.reason))
            requests.forget_file()
            came.append((tmp_path / "STOP").exists())
            came.append(requests.came())
    assert came == [(False, None), True, False, (True, f"file {tmp_path / 'STOP'}"), False, True]
