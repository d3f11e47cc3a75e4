"""Weights on a node's own disk: copied once and whole, a node that cannot do so is named, the loader reads the copy."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from comol_ds.errors import UserError
from comol_ds.parallel.staging import copy_of, open_weights, stage, stage_dir
from comol_ds.parallel.weight_files import WeightFiles
from tests.distributed.launching import REPOSITORY
from tests.slurm.cluster_runs import assert_same_run, everything_logged
from tests.tiny_models import save_tiny_model

STAGE = REPOSITORY / "launch" / "slurm" / "stage.py"


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    """A model in several files."""
    whole, sharded = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("sharded") / "tiny model"
    AutoModelForCausalLM.from_pretrained(save_tiny_model(whole)).save_pretrained(sharded, max_shard_size="60KB")
    return sharded


@pytest.fixture
def model(stored, tmp_path) -> Path:
    return shutil.copytree(stored, tmp_path / "tiny model")


@pytest.fixture
def disk(tmp_path) -> Path:
    return tmp_path / "disk"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def weights_of(model: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(model).items() if name.startswith("model")}


def start(model: Path, disk: Path, **variables: str) -> subprocess.Popen:
    """launch/slurm/stage.py as a task of a node's own."""
    environment = os.environ | {"COMOL_STAGE_DIR": str(disk), "PYTHONPATH": str(REPOSITORY)} | variables
    settings = {"--model_name_or_path": model, "--dataset": "none", "--ds_config": REPOSITORY / "ds_configs/zero3.json"}
    words = [sys.executable, str(STAGE), *(str(word) for setting in settings.items() for word in setting)]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_of_two_processes_on_one_node_one_copies_and_both_have_the_copy(model, tmp_path):
    (tmp_path / "disk-n7").mkdir()
    tasks = [start(model, tmp_path / "disk-$SLURMD_NODENAME", SLURMD_NODENAME="n7") for _ in range(2)]
    said = [task.communicate(timeout=120) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    [copy] = [path for path in (tmp_path / "disk-n7").iterdir() if path.is_dir()]
    assert copy.name.startswith("tiny_model-")
    assert contents(copy) == weights_of(model)
    lines = sorted(output.splitlines()[-1].partition(str(copy)) for output, _ in said)
    assert [line[0] for line in lines] == ["stage: node n7: "] * 2
    assert lines[0][2].endswith(" s") and lines[1][2] == " was there", lines


def test_a_copy_is_reused_until_the_weights_change_and_changed_ones_are_another_copy(model, disk):
    first, copied = stage(WeightFiles(str(model)), disk)
    assert copied == sum(map(len, weights_of(model).values()))
    assert stage(WeightFiles(str(model)), disk) == (first, 0)
    file = next(model.glob("model-*"))
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    second, copied = stage(WeightFiles(str(model)), disk)
    assert copied > 0 and second != first
    assert contents(first) == contents(second) == weights_of(model)


@pytest.mark.parametrize("damage", ["file deleted", "file cut short", "copy interrupted"])
def test_an_incomplete_copy_is_replaced(model, disk, damage):
    weights = WeightFiles(str(model))
    copy, _ = stage(weights, disk)
    file = next(copy.glob("model-*"))
    if damage == "file deleted":
        file.unlink()
    elif damage == "file cut short":
        os.truncate(file, 100)
    else:
        file.unlink()
        copy.rename(f"{copy}.writing")
    assert stage(weights, disk)[1] > 0
    assert contents(copy) == weights_of(model)
    assert sorted(path.name for path in disk.iterdir()) == [copy.name, f"{copy.name}.lock"]


def test_a_copy_that_fails_leaves_nothing_behind(model, disk, monkeypatch):
    def fail(source: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.raises(OSError, match="No space left"):
        stage(WeightFiles(str(model)), disk)
    assert [path.suffix for path in disk.iterdir()] == [".lock"]


def test_shards_in_subfolders_are_copied_into_the_copys_own(model, disk):
    index = model / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    (model / "deep").mkdir()
    for shard in set(listed["weight_map"].values()):
        (model / shard).rename(model / "deep" / shard)
    listed["weight_map"] = {name: f"deep/{shard}" for name, shard in listed["weight_map"].items()}
    index.write_text(json.dumps(listed))
    copy, _ = stage(WeightFiles(str(model)), disk)
    assert contents(copy) == {name: content for name, content in contents(model).items() if "model" in name}
    assert len(list((copy / "deep").iterdir())) > 2


@pytest.mark.parametrize("suffix", ["", ".writing", ".lock"])
def test_nothing_is_written_through_a_link_that_lies_in_the_folder(suffix, model, disk, tmp_path):
    weights, victim = WeightFiles(str(model)), tmp_path / "victim"
    victim.mkdir()
    (victim / "notes.txt").write_text("mine")
    disk.mkdir()
    link = disk / f"{copy_of(weights, disk).name}{suffix}"
    link.symlink_to(victim / "lock" if suffix == ".lock" else victim)
    with pytest.raises(OSError):
        stage(weights, disk)
    assert contents(victim) == {"notes.txt": b"mine"}
    link.unlink()
    assert contents(stage(weights, disk)[0]) == weights_of(model)


def test_a_model_folder_with_a_long_name_has_a_copy(model, disk, tmp_path):
    model = model.rename(tmp_path / ("模" * 80))
    copy, size = stage(WeightFiles(str(model)), disk)
    assert size > 0 and contents(copy) == weights_of(model)


def test_the_loader_reads_the_copy_and_only_where_the_variable_is_set(model, disk, monkeypatch):
    copy, _ = stage(WeightFiles(str(model)), disk)

    def folders() -> set[Path]:
        return {tensor.file.parent for tensor in open_weights(str(model)).by_name.values()}

    assert folders() == {model}
    monkeypatch.setenv("COMOL_STAGE_DIR", str(disk))
    assert folders() == {copy}


def test_the_loader_refuses_a_node_without_a_copy(model, disk, monkeypatch):
    monkeypatch.setenv("COMOL_STAGE_DIR", str(disk))
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    with pytest.raises(UserError) as raised:
        open_weights(str(model))
    assert str(raised.value) == (
        f"node n7: COMOL_STAGE_DIR {disk} has no copy of the weights of --model_name_or_path {model};"
        " run launch/slurm/stage.py on every node, or unset COMOL_STAGE_DIR"
    )


@pytest.mark.parametrize(
    ("text", "on_this_node"), [("scratch", "scratch"), ("$NO_SUCH_DISK/scratch", "$NO_SUCH_DISK/scratch")]
)
def test_a_stage_folder_is_an_absolute_path_of_variables_that_are_set(text, on_this_node, monkeypatch):
    monkeypatch.setenv("COMOL_STAGE_DIR", text)
    with pytest.raises(UserError) as raised:
        stage_dir()
    assert str(raised.value) == f"COMOL_STAGE_DIR is {text!r}, on this node {on_this_node!r}; name an absolute path"


def test_a_disk_that_is_not_mounted_is_not_replaced_by_a_folder(model, tmp_path):
    with pytest.raises(FileNotFoundError):
        stage(WeightFiles(str(model)), tmp_path / "local" / "scratch")
    assert not (tmp_path / "local").exists()


@pytest.mark.slow
def test_a_copy_that_does_not_end_is_given_up_and_a_signal_asks_to_start_again(model, disk):
    """Somebody else holds the lock for ever, as a copy to a stuck disk would."""
    disk.mkdir()
    lock = disk / f"{copy_of(WeightFiles(str(model)), disk).name}.lock"
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        late = start(model, disk, COMOL_STAGE_SECONDS="1", SLURMD_NODENAME="n7")
        signaled = start(model, disk)
        _, errors = late.communicate(timeout=120)
        assert late.returncode == 2
        assert errors.splitlines()[-1] == (
            f"stage: error: node n7: copying the weights to COMOL_STAGE_DIR {disk} does not end within 1 s"
        )
        while not waits_for_lock(signaled.pid):
            assert signaled.poll() is None
            time.sleep(0.05)
        signaled.send_signal(signal.SIGTERM)
        assert signaled.wait(timeout=20) == 75, signaled.communicate()


def waits_for_lock(process: int) -> bool:
    return any("->" in line and f" {process} " in line for line in Path("/proc/locks").read_text().splitlines())


ZEROS_INSTEAD = """\
#!/bin/bash
# once the weights are staged, the original's tensors become zeros; path, size and time of change stay the same
if [[ "$*" == *launch/train.py* ]]; then
    cp --preserve=timestamps {zeros} {file}.$SLURM_PROCID && mv {file}.$SLURM_PROCID {file} || exit 9
fi
exec "$@"
"""


def zeroed(file: Path) -> Path:
    """A safetensors file beside this one with the same header and time of change, and zeros for tensors."""
    content, copy = file.read_bytes(), file.with_name("zeros")
    data = 8 + int.from_bytes(content[:8], "little")
    copy.write_bytes(content[:data] + bytes(len(content) - data))
    shutil.copystat(file, copy)
    return copy


def container(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


@pytest.mark.slurm
@pytest.mark.exhaustive
@pytest.mark.timeout(600)
def test_a_job_reads_the_weights_from_its_nodes_disks_and_records_the_original(cluster, reference, submit, tmp_path):
    model = shutil.copytree(reference[0], tmp_path / "model")
    file = model / "model.safetensors"
    words = ZEROS_INSTEAD.format(zeros=zeroed(file), file=file)
    job = submit(
        "train.sbatch", "--model_name_or_path", str(model), COMOL_PREFLIGHT="0",
        COMOL_STAGE_DIR=f"{tmp_path}/disk-$SLURMD_NODENAME", COMOL_RUN_IN=container(tmp_path / "container", words),
    )  # fmt: skip
    ended = cluster.wait_for_end(job, 200)
    logged = everything_logged(tmp_path)
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), logged
    for node in cluster.nodes:
        [copy] = (tmp_path / f"disk-{node}").glob("model-*[!k]")
        assert f"stage: node {node}: {copy} 0.000 GiB copied in" in logged
    assert_same_run(tmp_path / "out", reference[1])
    written = (file for name in ("*.json", "*.yaml", "COMMITTED") for file in (tmp_path / "out").rglob(name))
    assert not [file for file in written if "disk-" in file.read_text()]
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model)


@pytest.mark.slurm
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "script", ["train.sbatch", pytest.param("train_torchrun.sbatch", marks=pytest.mark.exhaustive)]
)
def test_staging_names_the_node_whose_disk_is_full_and_nothing_trains(cluster, reference, submit, tmp_path, script):
    """Two ranks per node, one task of which copies; the second node's disk has 16 KiB."""
    bad, disk = cluster.nodes[1], tmp_path / "disk"
    disk.mkdir()
    words = (
        "#!/bin/bash\n"
        f'[[ $SLURMD_NODENAME == {bad} ]] || exec "$@"\n'
        f'exec unshare --mount bash -c \'mount -t tmpfs -o size=16k tmpfs {disk} && exec "$@"\' bash "$@"\n'
    )
    job = submit(
        script, options=("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2"), COMOL_PREFLIGHT="0",
        COMOL_STAGE_DIR=str(disk), COMOL_RUN_IN=container(tmp_path / "container", words),
    )  # fmt: skip
    ended = cluster.wait_for_end(job, 120)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "2:0"), everything_logged(tmp_path)
    logs = {path.name: path.read_text() for path in (tmp_path / "logs" / job).iterdir()}
    assert logs.keys() == {"stage_rank0.log", "stage_rank1.log"}
    assert f"stage: node {cluster.nodes[0]}: {disk}/model-" in logs["stage_rank0.log"]
    [error] = [line for line in logs["stage_rank1.log"].splitlines() if line.startswith("stage: error")]
    size = (reference[0] / "model.safetensors").stat().st_size
    assert error == (
        f"stage: error: node {bad}: copying the weights to COMOL_STAGE_DIR {disk} fails: {size:,} bytes are needed and"
        " 16,384 free; make room or choose another COMOL_STAGE_DIR"
    )
    assert error in (tmp_path / "job.log").read_text()
