"""launch/train.py on the nodes of a real SLURM cluster: to the end, over a requeue, and not at all past a bad node."""

from pathlib import Path

import pytest
import torch

from comol_ds.adapters.adapter_folder import read_adapter
from tests.distributed.launching import REPOSITORY, SHARED_MEMORY, run_deepspeed
from tests.distributed.run_folders import json_lines
from tests.distributed.test_run_and_resume import arguments
from tests.tiny_models import save_tiny_model

pytestmark = [pytest.mark.slurm, pytest.mark.distributed, pytest.mark.timeout(300)]
STEPS, SAVE_STEPS = 16, 4
CHANGES = {"max_steps": STEPS, "save_steps": SAVE_STEPS, "report_to": "none", "max_generate_records": 0}
TWO_TASKS = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1")


@pytest.fixture(scope="module")
def reference(tmp_path_factory, extensions):
    """The same run under the deepspeed launcher on two ranks: (model folder, run folder)."""
    folder = tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        model = save_tiny_model(folder / "model")
        words = arguments(model, folder / "out", **CHANGES)
        run = run_deepspeed(2, REPOSITORY / "launch" / "train.py", words, extensions)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return model, folder / "out"


@pytest.fixture
def submit(cluster, reference, extensions, tmp_path):
    """Submits a batch script with the reference's settings and returns the job's number. All logs lie in tmp_path."""
    jobs = []

    def call(script: str = "train.sbatch", **extra: str) -> str:
        options = [*TWO_TASKS, f"--output={tmp_path}/job.log"]
        words = arguments(reference[0], tmp_path / "out", **CHANGES)
        extra |= {
            "COMOL_LOGS": str(tmp_path / "logs"), "HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1",
            "TORCH_EXTENSIONS_DIR": str(extensions), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY),
        }  # fmt: skip
        script = str(REPOSITORY / "launch" / "slurm" / script)
        jobs.append(cluster.submit(*options, script, *words, cwd=REPOSITORY, **extra))
        return jobs[-1]

    yield call
    for job in jobs:
        for restart in range(3):
            port = 20000 + (int(job) * 7 + restart) % 10000
            for leftover in SHARED_MEMORY.glob(f"deepspeed_*_{port}_*"):
                leftover.unlink(missing_ok=True)


def everything_logged(folder: Path) -> str:
    logs = [folder / "job.log", *sorted((folder / "logs").glob("*/*"))]
    return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in logs if path.exists())


def assert_same_run(out: Path, expected: Path) -> None:
    """Metrics of every step, and the adapter, bit for bit."""
    bits = [
        [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in json_lines(folder / "metrics.jsonl")]
        for folder in (out, expected)
    ]
    assert [line[0] for line in bits[0]] == list(range(1, STEPS + 1))
    assert bits[0] == bits[1]
    found, wanted = read_adapter(out / "adapter")[1], read_adapter(expected / "adapter")[1]
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


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
    committed = tmp_path / "out" / "checkpoints" / f"step_{SAVE_STEPS}" / "COMMITTED"
    cluster.wait_until(committed.exists, "the first checkpoint", 90)
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
