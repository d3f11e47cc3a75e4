"""The batch script alone, with a stub in place of the trainer: arguments, logs, requeue, and an end for good."""

import os
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from tests.distributed.launching import REPOSITORY, free_port

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(180)]
SCRIPTS = REPOSITORY / "launch" / "slurm"
TWO_TASKS = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1")

# Ends with 75 until its first restart; with `wait` among its arguments it saves on SIGTERM only, and ends with 75.
TRAINER = """\
import os, signal, sys, time
restart, rank = int(os.environ.get("SLURM_RESTART_COUNT", "0")), int(os.environ["SLURM_PROCID"])
print("restart", restart, "rank", rank, sys.argv[1:], flush=True)
print("time limit", os.environ.get("SLURM_JOB_END_TIME"), flush=True)
if "wait" in sys.argv:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
    time.sleep(60)
if "crash" in sys.argv:
    sys.exit(3 * rank)
time.sleep(3 * rank)  # a rank that saves for longer must not be killed
print("saved", restart, flush=True)
sys.exit(75 if restart < 1 else 0)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the script expects around it: launch/train.py is the stub."""
    made = tmp_path_factory.mktemp("repository")
    shutil.copytree(SCRIPTS, made / "launch" / "slurm")
    (made / "launch" / "train.py").write_text(TRAINER)
    return made


@pytest.fixture(scope="module")
def submit(cluster, folder):
    def call(*arguments: str, options: tuple[str, ...] = ()) -> str:
        script = str(folder / "launch" / "slurm" / "train.sbatch")
        return cluster.submit(*TWO_TASKS, *options, script, *arguments, cwd=folder, COMOL_PREFLIGHT="0")

    return call


@pytest.fixture(scope="module")
def submitted(submit) -> tuple[str, str]:
    """A job and an array of two, at the same time: each waits some 15 s for its requeue."""
    array = submit("--seed", "{task}", "--output_dir", "runs/{task}", options=("--array=3,5",))
    return submit("--seed", "1", "--output_dir", "a b"), array


def rank_log(folder: Path, job: str, rank: int) -> str:
    return (folder / "slurm_logs" / job / f"train_rank{rank}.log").read_text()


def test_exit_code_75_requeues_the_job_until_it_ends_otherwise_and_the_logs_go_on(cluster, folder, submitted):
    job, _ = submitted
    ended = cluster.wait_for_end(job, 90)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1")
    words = ["--resume_from_checkpoint", "latest", "--seed", "1", "--output_dir", "a b"]
    for rank in range(2):
        assert [f"saved {restart}" in rank_log(folder, job, rank) for restart in range(2)] == [True, True]
        expected = [f"restart {restart} rank {rank} {words}" for restart in range(2)]
        assert [line for line in rank_log(folder, job, rank).splitlines() if line.startswith("restart")] == expected
    log = (folder / f"comol-{job}.log").read_text()
    assert log.count("the run is saved; requeueing job") == 1
    assert [log.count(f"restart {restart}, on 127.0.0.[11-12]") for restart in range(2)] == [1, 1]


def test_an_array_is_a_job_per_task_each_requeued_alone(cluster, folder, submitted):
    _, job = submitted
    for task in (3, 5):
        ended = cluster.wait_for_end(f"{job}_{task}", 120)
        assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")
        words = ["--resume_from_checkpoint", "latest", "--seed", str(task), "--output_dir", f"runs/{task}"]
        log = rank_log(folder, f"{job}_{task}", 0)
        assert [log.count(f"restart {restart} rank 0 {words}\n") for restart in range(2)] == [1, 1]


def test_scancel_ends_a_job_for_good_though_its_trainer_says_75(cluster, folder, submit):
    job = submit("wait")
    cluster.wait_until(lambda: "restart 0" in rank_log_or_nothing(folder, job), "the stub's first line", 60)
    cluster.command("scancel", job)
    ended = cluster.wait_for_end(job, 60)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")
    cluster.wait_until(lambda: not cluster.command("squeue", "--noheader"), "an empty queue", 60)
    assert cluster.job(job)["JobState"] == "CANCELLED"
    assert "requeueing" not in (folder / f"comol-{job}.log").read_text()


def rank_log_or_nothing(folder: Path, job: str) -> str:
    return "".join(path.read_text() for path in (folder / "slurm_logs" / job).glob("*.log"))


@pytest.mark.parametrize("limit", ["--time=7", "--time=UNLIMITED"])
def test_the_trainer_is_told_when_the_job_reaches_its_time_limit(cluster, folder, submit, limit):
    job = submit("wait", options=(limit,))
    cluster.wait_until(lambda: "time limit" in rank_log_or_nothing(folder, job), "the stub's line", 60)
    end = cluster.job(job)["EndTime"]
    cluster.command("scancel", job)
    cluster.wait_for_end(job, 60)
    expected = int(datetime.fromisoformat(end).timestamp()) if limit == "--time=7" else None
    assert f"time limit {expected}\n" in rank_log(folder, job, 0), end


@pytest.mark.parametrize(
    ("code", "facts", "asks"),
    [
        (75, "JobState=RUNNING Requeue=1 Restarts=2 NodeList=n1", True),
        (1, "JobState=RUNNING Requeue=1 Restarts=2 NodeList=n1", False),
        (75, "JobState=COMPLETING Requeue=1 Restarts=2 NodeList=n1", False),
        # SLURM has lost this node and runs the job on another
        (75, "JobState=RUNNING Requeue=1 Restarts=3 NodeList=n2", False),
    ],
)
def test_a_job_is_requeued_by_its_own_running_script_alone(tmp_path, code, facts, asks):
    (tmp_path / "scontrol").write_text(f'#!/bin/bash\necho "$*" >>{tmp_path}/asked\necho "JobId=7 {facts}"\n')
    (tmp_path / "scontrol").chmod(0o755)
    script = f"source {SCRIPTS}/job.sh; sleep() {{ :; }}; end_job {code}"
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}
    run = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=30)
    assert run.returncode == code, run.stderr
    assert ("requeue 7" in (tmp_path / "asked").read_text().splitlines()) == asks


def test_another_exit_code_ends_the_job_with_the_ranks_last_lines(cluster, folder, submit):
    job = submit("crash")
    ended = cluster.wait_for_end(job, 60)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "3:0", "0")
    log = (folder / f"comol-{job}.log").read_text()
    assert "train ended with exit code 3; its ranks' last lines:" in log
    assert "restart 0 rank 1" in log


def test_a_job_submitted_elsewhere_says_where_to_submit(cluster, tmp_path):
    job = cluster.submit(*TWO_TASKS, str(SCRIPTS / "train.sbatch"), cwd=tmp_path)
    ended = cluster.wait_for_end(job, 30)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "2:0")
    log = (tmp_path / f"comol-{job}.log").read_text()
    assert f"error: call sbatch in the repository's root, or with --chdir; this is {tmp_path}" in log


@pytest.mark.parametrize(("end", "code"), [("sys.exit(75)", 75), ("os.kill(os.getpid(), 9)", 137)])
def test_torchrun_ends_with_the_exit_code_of_its_ranks(tmp_path, end, code):
    (tmp_path / "rank.py").write_text(f"import os, sys\n{end}\n")
    launcher = [sys.executable, str(SCRIPTS / "torchrun.py"), "--nproc_per_node", "2", "--master_port"]
    run = subprocess.run(
        [*launcher, str(free_port()), str(tmp_path / "rank.py")], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == code, run.stderr[-2000:]


SRUN = """\
#!/bin/bash
while [[ $1 == --* ]]; do
    [[ $1 == --output=* ]] && output=${1#--output=}
    shift
done
for node in 1 0; do
    SLURM_NODEID=$node "$@" >"${output/\\%t/$node}" 2>&1 &
done
wait
"""


def test_torchrun_puts_its_ranks_on_the_nodes_in_slurms_order(folder, tmp_path):
    """The second node is the faster one, and both have one name: by itself torchrun would make it the first."""
    stubs = {"srun": SRUN, "scontrol": "#!/bin/bash\necho 127.0.0.1\n", "squeue": "#!/bin/bash\n"}
    for name, content in stubs.items():
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    shutil.copytree(folder, tmp_path / "repository")
    (tmp_path / "repository" / "launch" / "train.py").write_text(
        'import os\nprint("rank", os.environ["RANK"], "on node", os.environ["SLURM_NODEID"])\n'
    )
    environment = os.environ | {
        "PATH": os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "SLURM_JOB_ID": str(free_port()), "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]",
        "COMOL_PROCESSES_PER_NODE": "1", "COMOL_PREFLIGHT": "0", "COMOL_LOGS": str(tmp_path / "logs"),
    }  # fmt: skip
    run = subprocess.run(
        ["bash", "launch/slurm/train_torchrun.sbatch"], cwd=tmp_path / "repository", env=environment,
        capture_output=True, text=True, timeout=150,
    )  # fmt: skip
    logs = {path.name: path.read_text() for path in (tmp_path / "logs").rglob("*.log")}
    assert run.returncode == 0, (run.stderr, logs)
    assert all(f"rank {node} on node {node}\n" in logs[f"train_rank{node}.log"] for node in (0, 1)), logs
