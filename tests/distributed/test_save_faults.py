"""Saves that go wrong on two ranks: every rank stops with a clear message, none waits, the last commit stays."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from comol_ds.training.commit import damage_of, fault_of
from comol_ds.training.resume import find_checkpoint
from tests.distributed.launching import REPOSITORY, run_deepspeed
from tests.distributed.run_folders import json_lines
from tests.distributed.save_worker import WAIT_SECONDS
from tests.distributed.test_run_and_resume import arguments
from tests.tiny_models import save_tiny_model

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory, extensions):
    """(folder, report of rank 0, report of rank 1) of all cases."""
    folder = tmp_path_factory.mktemp("saves")
    worker = Path(__file__).parent / "save_worker.py"
    run = run_deepspeed(2, worker, [str(folder)], extensions)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return folder, *(json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(2))


def checkpoints_of(outcome, case: str) -> Path:
    return outcome[0] / case.replace(" ", "_") / "checkpoints"


def test_a_save_that_works_is_committed(outcome):
    _, first, second = outcome
    assert first["works"]["raised"] is None and second["works"]["raised"] is None
    target = checkpoints_of(outcome, "works") / "step_2"
    assert fault_of(target) is None and damage_of(target) is None
    assert sorted(path.name for path in target.iterdir()) == ["COMMITTED", "part_0", "part_1"]


REASON = "checkpoint {path} cannot be written, "
RAISED = {
    "full disk": ("RuntimeError: rank 1 failed at 'write step_2': " + REASON, "RuntimeError: " + REASON),
    "full disk on rank 0": ("RuntimeError: " + REASON, "RuntimeError: rank 0 failed at 'write step_2': " + REASON),
    "stuck": (
        "RuntimeError: rank 1 failed at 'write step_2': writing step_2 has not ended after 4 s",
        "RuntimeError: writing step_2 has not ended after 4 s; is the file system stuck?",
    ),
    "overtaken": (
        "Overtaken: {run} was taken over by process ",
        "RuntimeError: rank 0 failed at 'commit step_2': {run} was taken over by process ",
    ),
}


@pytest.mark.parametrize("case", RAISED)
def test_every_rank_stops_with_the_reason_and_the_last_commit_stays(case, outcome):
    checkpoints = checkpoints_of(outcome, case)
    for report, start in zip(outcome[1:], RAISED[case], strict=True):
        expected = start.format(path=checkpoints / "step_2", run=checkpoints.parent)
        assert report[case]["raised"].startswith(expected), report[case]["raised"]
        assert report[case]["seconds"] < WAIT_SECONDS + 3
    if case.startswith("full"):
        assert all("step_1 is untouched, continue it with" in report[case]["raised"] for report in outcome[1:])
        assert [path.name for path in checkpoints.iterdir()] == ["step_1"], "what was half written is gone"
    found, _ = find_checkpoint("latest", checkpoints)
    assert found == checkpoints / "step_1" and damage_of(found) is None


def test_a_save_costs_no_waiting_and_ends_when_the_run_stops_on_an_error(outcome):
    case = "ended by an error elsewhere"
    for report in outcome[1:]:
        assert report[case]["started"] < 0.7 < 1 <= report[case]["seconds"], "writing takes 1 s, in a thread"
    assert fault_of(checkpoints_of(outcome, case) / "step_2") is None


def test_a_run_on_a_disk_that_fills_up_stops_and_continues_when_there_is_room(tmp_path, extensions, monkeypatch):
    """A file system of few MiB, a checkpoint after every step."""
    if subprocess.run(["id", "-u"], capture_output=True, text=True).stdout.strip() != "0":
        pytest.skip("mounting a small tmpfs needs root")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model, small = save_tiny_model(tmp_path / "model"), tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(small)], check=True)
    try:
        words = arguments(model, small / "out", save_steps=1, report_to="none")
        run = run_deepspeed(2, REPOSITORY / "launch" / "train.py", words, extensions)
        printed = run.stdout + run.stderr
        assert run.returncode not in (0, 2, 75)
        # the checkpoint, or a line of a log while the checkpoint is being written
        reasons = [line for line in printed.splitlines() if "RuntimeError" in line and "cannot be written" in line]
        assert reasons and all("with --resume_from_checkpoint" in line for line in reasons), printed[-3000:]
        found, passed_over = find_checkpoint("latest", small / "out" / "checkpoints")
        assert passed_over == [] and damage_of(found) is None
        reached = int(found.name.removeprefix("step_"))
        assert 1 <= reached < 8
        subprocess.run(["mount", "-o", "remount,size=30m", str(small)], check=True)
        run = run_deepspeed(2, REPOSITORY / "launch" / "train.py", [*words, "--resume_from_checkpoint"], extensions)
        assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
        assert f"resumed from {found}: step {reached} of 8, by DeepSpeed's own files" in run.stdout
        assert [line["step"] for line in json_lines(small / "out" / "metrics.jsonl")] == list(range(1, 9))
    finally:
        subprocess.run(["umount", str(small)], check=True)
        shutil.rmtree(small)
