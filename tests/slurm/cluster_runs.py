"""Runs of launch/train.py on the cluster: the run they must equal, how a job is submitted, and its ranks."""

from pathlib import Path

import pytest
import torch

from comol_ds.adapters.adapter_folder import read_adapter
from tests.distributed.launching import REPOSITORY, SHARED_MEMORY, run_deepspeed
from tests.distributed.run_folders import json_lines
from tests.distributed.test_run_and_resume import arguments
from tests.slurm.cluster import Cluster
from tests.tiny_models import save_tiny_model

STEPS, SAVE_STEPS = 16, 4
CHANGES = {"max_steps": STEPS, "save_steps": SAVE_STEPS, "report_to": "none", "max_generate_records": 0}
TWO_TASKS = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1")


@pytest.fixture(scope="session")
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

    def call(script: str = "train.sbatch", *more: str, options: tuple[str, ...] = TWO_TASKS, **extra: str) -> str:
        words = [*arguments(reference[0], tmp_path / "out", **CHANGES), *more]
        extra |= {
            "COMOL_LOGS": str(tmp_path / "logs"), "HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1",
            "TORCH_EXTENSIONS_DIR": str(extensions), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY),
        }  # fmt: skip
        script = str(REPOSITORY / "launch" / "slurm" / script)
        jobs.append(cluster.submit(*options, f"--output={tmp_path}/job.log", script, *words, cwd=REPOSITORY, **extra))
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


def wait_for_first_checkpoint(cluster: Cluster, out: Path) -> None:
    committed = out / "checkpoints" / f"step_{SAVE_STEPS}" / "COMMITTED"
    cluster.wait_until(committed.exists, "the first checkpoint", 150)
