"""launch/train.py on the nodes of a real SLURM cluster: to the end, over a requeue, and not at all past a bad node."""

import pytest

from tests.slurm.cluster_runs import assert_same_run, everything_logged, wait_for_first_checkpoint

pytestmark = [pytest.mark.slurm, pytest.mark.distributed, pytest.mark.timeout(300)]


@pytest.mark.parametrize(
    "script", ["train.sbatch", pytest.param("train_torchrun.sbatch", marks=pytest.mark.exhaustive)]
)
def test_a_job_over_two_nodes_trains_the_same_adapter_as_the_deepspeed_launcher(
    cluster, reference, submit, tmp_path, script
):
    job = submit(script, COMOL_PROCESSES_PER_NODE="1")
    ended = cluster.wait_for_end(job, 150)
    logged = everything_logged(tmp_path)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "0"), logged
    assert f"preflight: 2 ranks reach each other, and every node writes {tmp_path / 'out'}" in logged
    assert "data-parallel = 8 global" in (tmp_path / "logs" / job / "train_rank0.log").read_text()
    assert_same_run(tmp_path / "out", reference[1])


WAYS = {
    "requeue": ["scontrol", "requeue", "{job}"],
    "signal": ["scancel", "--signal=USR1", "{job}"],
    "preemption": ["sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"],
}


@pytest.mark.parametrize("way", ["requeue", "signal", pytest.param("preemption", marks=pytest.mark.exhaustive)])
def test_an_interrupted_job_goes_on_from_its_last_commit_without_gap_or_repeat(
    cluster, reference, submit, tmp_path, way
):
    job = submit(COMOL_PREFLIGHT="0")
    wait_for_first_checkpoint(cluster, tmp_path / "out")
    cluster.command(*(word.format(job=job) for word in WAYS[way]))
    cluster.wait_until(lambda: cluster.job(job)["Restarts"] == "1", "the requeue", 45)
    ended = cluster.wait_for_end(job, 150)
    logged = everything_logged(tmp_path)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1"), logged
    asked_itself = "the run is saved; requeueing job" in (tmp_path / "job.log").read_text()
    assert asked_itself == (way != "requeue"), logged
    rank_0 = (tmp_path / "logs" / job / "train_rank0.log").read_text()
    assert rank_0.count("data-parallel = 8 global") == 2, "both starts in one log"
    assert f"resumed from {tmp_path / 'out' / 'checkpoints'}/step_" in rank_0
    assert_same_run(tmp_path / "out", reference[1])


def test_preflight_names_the_node_that_cannot_write_the_output_folder(cluster, submit, tmp_path):
    """On the second node the output folder is a read-only file system."""
    out, bad = tmp_path / "out", cluster.nodes[1]
    out.mkdir()
    container = tmp_path / "container"
    container.write_text(
        "#!/bin/bash\n"
        f'[[ $SLURMD_NODENAME == {bad} ]] || exec "$@"\n'
        f'exec unshare --mount bash -c \'mount -t tmpfs -o ro tmpfs {out} && exec "$@"\' bash "$@"\n'
    )
    container.chmod(0o755)
    job = submit(COMOL_RUN_IN=str(container))
    ended = cluster.wait_for_end(job, 90)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "2:0"), everything_logged(tmp_path)
    logs = {path.name: path.read_text() for path in (tmp_path / "logs" / job).iterdir()}
    assert logs.keys() == {"preflight_rank0.log", "preflight_rank1.log"}, "nothing trains"
    errors = [line for log in logs.values() for line in log.splitlines() if line.startswith("preflight: error")]
    [error] = errors
    assert error.startswith(f"preflight: error: node {bad}: writing --output_dir {out} fails: [Errno 30] Read-only")
    assert error in (tmp_path / "job.log").read_text()
