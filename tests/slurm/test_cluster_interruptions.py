"""Jobs that reach their time limit or lose a node go on by themselves, and end as if nothing had happened."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread

import pytest

from tests.slurm.cluster_runs import TWO_TASKS, assert_same_run, everything_logged, wait_for_first_checkpoint

pytestmark = [pytest.mark.slurm, pytest.mark.distributed, pytest.mark.exhaustive, pytest.mark.timeout(600)]


def send(number: signal.Signals, ranks: dict[int, list[int]]) -> None:
    for process in (process for processes in ranks.values() for process in processes):
        with suppress(ProcessLookupError):
            os.kill(process, number)


def have_ended(processes: list[int]) -> bool:
    return not any(Path(f"/proc/{process}").exists() for process in processes)


@contextmanager
def slowed(ranks: dict[int, list[int]]) -> Iterator[None]:
    """Processes that run for a thirtieth of the time: 16 steps of a tiny model then last for a minute or more."""
    ended = Event()

    def pulse() -> None:
        while not ended.is_set():
            send(signal.SIGSTOP, ranks)
            ended.wait(1.0)
            send(signal.SIGCONT, ranks)
            time.sleep(0.03)

    thread = Thread(target=pulse)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_a_job_saves_before_its_time_limit_and_starts_again_until_it_is_done(cluster, reference, submit, tmp_path):
    """SLURM counts limits in minutes: two, of which the margin leaves the trainer one."""
    words = ("--stop_margin_minutes", "1")
    job = submit("train.sbatch", *words, options=(*TWO_TASKS, "--time=2"), COMOL_PREFLIGHT="0")
    wait_for_first_checkpoint(cluster, tmp_path / "out")
    with slowed(cluster.ranks(job)):
        cluster.wait_until(lambda: cluster.job(job)["Restarts"] == "1", "the requeue", 100)
    ended = cluster.wait_for_end(job, 240)
    logged = everything_logged(tmp_path)
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), logged
    # on a busy machine the second start may reach its limit too
    stops = (tmp_path / "logs" / job / "train_rank0.log").read_text().count(": the SLURM job ends in ")
    requeues = (tmp_path / "job.log").read_text().count("the run is saved; requeueing job")
    assert stops == requeues == int(ended["Restarts"]) >= 1, logged
    assert_same_run(tmp_path / "out", reference[1])


@pytest.fixture
def nodes_in_service(cluster):
    """Whatever happens to a node's slurmd, the next test finds it running; SLURM then ends what a dead one has left."""
    yield
    for node in cluster.nodes:
        cluster.restart_node(node)


def requeued(facts: dict[str, str]) -> bool:
    return (facts["JobState"], facts["Restarts"]) == ("PENDING", "1")


def test_a_job_whose_node_hangs_and_loses_its_slurmd_goes_on_when_the_node_is_back(
    cluster, reference, submit, tmp_path, nodes_in_service
):
    job = submit(COMOL_PREFLIGHT="0")
    wait_for_first_checkpoint(cluster, tmp_path / "out")
    lost = {1: cluster.ranks(job)[1]}
    send(signal.SIGSTOP, lost)
    cluster.kill_node(cluster.nodes[1])
    cluster.wait_until(lambda: requeued(cluster.job(job)), "a requeued job that waits for a node", 90)
    assert cluster.ranks(job)[1] == lost[1], "the rank outlives its slurmd"
    cluster.restart_node(cluster.nodes[1])
    cluster.wait_until(lambda: have_ended(lost[1]), "the end of the rank, now that SLURM knows of it", 30)
    ended = cluster.wait_for_end(job, 240)
    logged = everything_logged(tmp_path)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1"), logged
    assert "requeueing job" not in (tmp_path / "job.log").read_text(), logged
    assert f"resumed from {tmp_path / 'out' / 'checkpoints'}/step_" in logged
    assert_same_run(tmp_path / "out", reference[1])


def test_ranks_that_outlive_their_slurmd_do_not_spoil_the_job_that_replaced_them(
    cluster, reference, submit, tmp_path, nodes_in_service
):
    """Both ranks stand on one node, SLURM starts them again on the other one, and then the old ones train on."""
    job = submit(options=("--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2"), COMOL_PREFLIGHT="0")
    wait_for_first_checkpoint(cluster, tmp_path / "out")
    old = cluster.ranks(job)
    send(signal.SIGSTOP, old)
    cluster.kill_node(cluster.job(job)["BatchHost"])
    rank_0 = tmp_path / "logs" / job / "train_rank0.log"
    cluster.wait_until(lambda: "resumed from " in rank_0.read_text(), "the second start", 240)
    new = {rank: [p for p in ps if p not in old[rank]] for rank, ps in cluster.ranks(job).items()}
    send(signal.SIGCONT, old)
    with slowed(new):
        cluster.wait_until(lambda: have_ended(old[0]), "the end of the old rank 0", 120)
    ended = cluster.wait_for_end(job, 240)
    logged = everything_logged(tmp_path)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1"), logged
    assert "was taken over by" in rank_0.read_text(), logged
    assert_same_run(tmp_path / "out", reference[1])
