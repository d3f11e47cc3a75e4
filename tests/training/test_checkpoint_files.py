"""Which checkpoints may be used, which are found, and which are deleted; no engine."""

import json
from pathlib import Path

import pytest

from comol_ds.errors import UserError
from comol_ds.training.checkpoint import MARKER, RunIdentity, _commit, fault_of, find_checkpoint, read_step

IDENTITY = {
    "world_size": 2, "tensor_parallel": 1, "zero_stage": 3, "bf16": False, "global_batch": 8, "micro_batch": 4,
    "seed": 1, "optim": "adamw_torch", "model": "m", "data": "d", "adapter": {"r": 4},
}  # fmt: skip


def write(folder: Path, step: int) -> Path:
    """An uncommitted checkpoint."""
    target = folder / f"step_{step}"
    for name, content in {
        "state.json": json.dumps({"step": step, "identity": IDENTITY}),
        "rng_rank0.pt": "r" * 40,
        "deepspeed/optimizer.pt": "o" * 100,
        "adapter/adapter_model.safetensors": "a" * 60,
    }.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(content)
    return target


def commit(folder: Path, *steps: int, limit: int | None = None) -> list[Path]:
    targets = [write(folder, step) for step in steps]
    for target in targets:
        _commit(folder, target, limit)
    return targets


def steps_in(folder: Path) -> set[int]:
    return {int(path.name.removeprefix("step_")) for path in folder.glob("step_*")}


def test_a_committed_checkpoint_has_no_fault(tmp_path):
    (target,) = commit(tmp_path, 5)
    assert fault_of(target) is None
    sizes = json.loads((target / MARKER).read_text())["sizes"]
    found = {str(path.relative_to(target)): path.stat().st_size for path in target.rglob("*") if path.is_file()}
    assert sizes == {name: size for name, size in found.items() if name != MARKER}
    assert sizes["deepspeed/optimizer.pt"] == 100


def test_faults(tmp_path):
    target = write(tmp_path, 5)
    assert fault_of(target) == f"it has no {MARKER} marker, the save did not finish"
    _commit(tmp_path, target, None)
    (target / "deepspeed/optimizer.pt").write_text("o" * 99)
    assert fault_of(target) == "deepspeed/optimizer.pt has 99 of 100 bytes"
    (target / "deepspeed/optimizer.pt").unlink()
    assert fault_of(target) == "deepspeed/optimizer.pt is missing"


@pytest.mark.parametrize("content", [b"", b'{"sizes": {"state.js', b"[]", b"{}", b'{"sizes": [1]}', b"\xff\xfe", b"7"])
def test_a_damaged_marker_is_a_fault(content, tmp_path):
    (target,) = commit(tmp_path, 5)
    (target / MARKER).write_bytes(content)
    assert fault_of(target) == f"its {MARKER} marker is damaged"


def test_latest_is_the_highest_step(tmp_path):
    commit(tmp_path, 9, 100, 10)
    (tmp_path / "step_final").mkdir()
    (tmp_path / "step_200").write_text("a file")
    assert find_checkpoint("latest", tmp_path) == (tmp_path / "step_100", [])


def test_nothing_to_resume_is_no_error(tmp_path):
    assert find_checkpoint("latest", tmp_path / "checkpoints") == (None, [])


def test_latest_falls_back_and_says_so(tmp_path):
    _, second, third = commit(tmp_path, 1, 2, 3)
    write(tmp_path, 4)
    (third / "rng_rank0.pt").write_text("r")
    found, passed_over = find_checkpoint("latest", tmp_path)
    assert found == second
    assert passed_over == [
        f"checkpoint {tmp_path}/step_4 is not usable: it has no {MARKER} marker, the save did not finish",
        f"checkpoint {tmp_path}/step_3 is not usable: rng_rank0.pt has 1 of 40 bytes",
    ]


def test_a_named_checkpoint_falls_back_to_earlier_ones_only(tmp_path):
    first, second, third = commit(tmp_path, 1, 2, 3)
    assert find_checkpoint(str(second), tmp_path / "elsewhere") == (second, [])
    (second / "state.json").unlink()
    found, passed_over = find_checkpoint(f"{second}/", tmp_path / "elsewhere")
    assert found == first
    assert passed_over == [f"checkpoint {second} is not usable: state.json is missing"]
    assert fault_of(third) is None


def test_nothing_usable(tmp_path):
    write(tmp_path, 1)
    write(tmp_path, 2)
    with pytest.raises(UserError, match=r"step_2 is not usable: .* no committed checkpoint is left"):
        find_checkpoint("latest", tmp_path)


def test_a_path_that_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"step_7: no such folder; give a step_<n> folder or latest"):
        find_checkpoint(str(tmp_path / "step_7"), tmp_path)
    with pytest.raises(UserError, match=r"not a step_<n> folder; give one or latest"):
        find_checkpoint(str(tmp_path), tmp_path)


def test_step_and_identity(tmp_path):
    (target,) = commit(tmp_path, 7)
    assert read_step(target, RunIdentity(**IDENTITY)) == 7
    with pytest.raises(UserError, match=r"written with adapter.r = 4, this run has 8"):
        read_step(target, RunIdentity(**IDENTITY | {"adapter": {"r": 8}}))


def test_the_limit_keeps_the_newest(tmp_path):
    commit(tmp_path, 1, 2, 3, limit=2)
    assert steps_in(tmp_path) == {2, 3}
    commit(tmp_path, 4, limit=1)
    assert steps_in(tmp_path) == {4}
    commit(tmp_path, 5, limit=None)
    assert steps_in(tmp_path) == {4, 5}


def test_an_uncommitted_checkpoint_neither_counts_nor_pushes_out_a_committed_one(tmp_path):
    commit(tmp_path, 1)
    write(tmp_path, 2)
    commit(tmp_path, 3, limit=2)
    assert steps_in(tmp_path) == {1, 2, 3}
    assert find_checkpoint("latest", tmp_path)[0] == tmp_path / "step_3"


def test_the_limit_never_deletes_what_was_just_committed(tmp_path):
    # continued from step 1 after the run had reached step 30
    commit(tmp_path, 20, 30)
    (target,) = commit(tmp_path, 2, limit=1)
    assert fault_of(target) is None
    assert steps_in(tmp_path) == {2, 30}


def test_nothing_is_deleted_before_the_new_one_is_committed(tmp_path, monkeypatch):
    commit(tmp_path, 1)
    target = write(tmp_path, 2)

    def no_space(path: Path, to: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "rename", no_space)
    with pytest.raises(OSError, match="disk full"):
        _commit(tmp_path, target, 1)
    assert find_checkpoint("latest", tmp_path)[0] == tmp_path / "step_1"
