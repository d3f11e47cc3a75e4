"""The commit protocol on real files: a crash at any instant, damage, a full disk, a missing rank, a second writer."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from comol_ds.checkpoint_names import MARKER, step_of
from comol_ds.training import commit as protocol
from comol_ds.training.checkpoint import torch_writer
from comol_ds.training.commit import Committer, Target, damage_of, fault_of, remove_leftovers, write_part
from comol_ds.training.generation import Overtaken
from comol_ds.training.resume import find_checkpoint
from tests.committed_files import claimed, commit_files, text_writers

PARTS = [
    {"state.json": '{"step": 1}', "deepspeed/zero_pp_rank_0.pt": "zero" * 20, "rng_rank0.pt": "r" * 9},
    {"deepspeed/zero_pp_rank_1.pt": "one" * 20, "rng_rank1.pt": "s" * 9},
]


@pytest.fixture(autouse=True)
def no_flush(monkeypatch):
    """Flushing takes 10 ms a call here, and what it does shows only when the power goes."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def checkpoints(tmp_path):
    return tmp_path / "out" / "checkpoints"


def test_what_is_renamed_or_marked_was_flushed_before(checkpoints, monkeypatch):
    done = []
    sync, rename = protocol.sync, Path.rename
    monkeypatch.setattr(protocol, "sync", lambda path: done.append(("sync", path.name)) or sync(path))
    monkeypatch.setattr(Path, "rename", lambda path, to: done.append(("rename", path.name)) or rename(path, to))
    commit_files(checkpoints, 5, *PARTS)
    renamed = done.index(("rename", "step_5.writing-1"))
    flushed = {name for what, name in done[:renamed] if what == "sync"}
    files = {Path(name).name for part in PARTS for name in part}
    assert flushed >= files | {"deepspeed", "step_5.writing-1"}
    marked = [
        ("sync", "checkpoints"),
        ("sync", f"{MARKER}.partial"),
        ("rename", f"{MARKER}.partial"),
        ("sync", "step_5"),
    ]
    assert done[renamed + 1 :] == marked


def test_a_committed_checkpoint_lists_every_file_with_size_and_checksum(checkpoints):
    path = commit_files(checkpoints, 5, *PARTS)
    assert fault_of(path) is None and damage_of(path) is None
    marker = json.loads((path / MARKER).read_text())
    assert marker["generation"] == 1
    found = {str(file.relative_to(path)): file.stat().st_size for file in path.rglob("*") if file.is_file()}
    assert {name: entry["bytes"] for name, entry in marker["files"].items()} | {MARKER: found[MARKER]} == found
    assert found.keys() == {*PARTS[0], *PARTS[1], MARKER}
    assert [item.name for item in checkpoints.iterdir()] == ["step_5"]


# every call that changes a name or puts content on the disk, in the order of a save
CALLS = ["write_text", "rename", "unlink", "mkdir", "fsync", "rmtree"]


class Crash(BaseException):
    """The end of the process: nothing catches it."""


def crash_at(monkeypatch, instant: int) -> list[str]:
    """Let the calls of a save work until number ``instant``, then end. Returns what was called."""
    called = []

    def counted(module, name):
        original = getattr(module, name)

        def call(*args, **kwargs):
            if len(called) == instant:
                raise Crash
            called.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    for name in ("write_text", "rename", "unlink", "mkdir"):
        counted(Path, name)
    counted(os, "fsync")  # which the fixture has replaced
    counted(shutil, "rmtree")
    return called


def save_steps(checkpoints: Path, claim, *steps: int) -> None:
    for step in steps:
        commit_files(checkpoints, step, {"state.json": f'{{"step": {step}}}'}, PARTS[1], keep=2, claim=claim)


def test_a_crash_at_any_instant_leaves_the_checkpoint_before_or_the_new_one(checkpoints, monkeypatch, tmp_path):
    """Three checkpoints with two kept, cut off at every call in turn; then the next run starts and finishes."""
    claim = claimed(checkpoints)
    with monkeypatch.context() as patch:
        calls = crash_at(patch, 10**9)
        save_steps(checkpoints, claim, 1, 2, 3)
    assert {"write_text", "rename", "unlink", "mkdir", "fsync", "rmtree"} == set(calls)
    seen = set()
    for instant in range(len(calls)):
        folder = tmp_path / str(instant) / "checkpoints"
        claim = claimed(folder)
        with monkeypatch.context() as patch, pytest.raises(Crash):
            crash_at(patch, instant)
            save_steps(folder, claim, 1, 2, 3)
        found, _ = find_checkpoint("latest", folder)
        reached = step_of(found) if found else 0
        seen.add(reached)
        assert found is None or damage_of(found) is None
        claim = claimed(folder)
        remove_leftovers(folder)
        kept = {path.name for path in folder.iterdir()} if folder.exists() else set()
        assert kept <= {f"step_{step}" for step in range(max(0, reached - 2), reached + 1)}, instant
        assert all(fault_of(folder / name) is None for name in kept)
        save_steps(folder, claim, *range(reached + 1, 4))
        # the oldest may still wait to be deleted, after the next save
        assert {path.name for path in folder.iterdir()} == (kept if reached == 3 else {"step_2", "step_3"})
    assert seen == {0, 1, 2, 3}


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("name", "harm", "fault"),
    [
        ("training_state/tensors.safetensors", truncate, "training_state/tensors.safetensors has 135 of 136 bytes"),
        ("deepspeed/zero_pp_rank_1.pt", Path.unlink, "deepspeed/zero_pp_rank_1.pt is missing"),
        ("rng_rank1.pt", Path.unlink, "rng_rank1.pt is missing"),
        ("state.json", flip_a_byte, "the content of state.json is not what was written"),
        (MARKER, Path.unlink, f"it has no {MARKER} marker, the save did not finish"),
    ],
    ids=str,
)
def test_faults_that_every_rank_sees_before_any_work(name, harm, fault, checkpoints):
    path = commit_tensors(checkpoints)
    harm(path / name)
    assert fault_of(path) == fault


def commit_tensors(checkpoints: Path) -> Path:
    claim = claimed(checkpoints)
    target = Target(checkpoints, 1, claim.number)
    tensors = {"training_state/tensors.safetensors": lambda path: save_file({"fp32:x": torch.ones(16)}, path)}
    write_part(target, 0, text_writers(PARTS[0]) | tensors)
    write_part(target, 1, text_writers(PARTS[1]))
    Committer(2, claim, None, 1).commit(target)
    return target.path


@pytest.mark.parametrize("name", ["training_state/tensors.safetensors", "deepspeed/zero_pp_rank_1.pt", "rng_rank0.pt"])
def test_a_flipped_byte_is_found_by_exactly_one_of_the_ranks_that_share_the_reading(name, checkpoints):
    path = commit_tensors(checkpoints)
    flip_a_byte(path / name)
    assert fault_of(path) is None
    found = [damage_of(path, rank, 3) for rank in range(3)]
    assert sorted(found, key=str) == [None, None, f"the content of {name} is not what was written"]


@pytest.mark.parametrize("content", [b"", b'{"files": {"state.js', b"[]", b"{}", b'{"files": [1]}', b"\xff\xfe", b"7"])
def test_a_damaged_marker_is_a_fault(content, checkpoints):
    path = commit_files(checkpoints, 5, *PARTS)
    (path / MARKER).write_bytes(content)
    assert fault_of(path) == f"its {MARKER} marker is damaged"


def test_a_marker_that_lists_a_file_elsewhere_is_a_fault(checkpoints):
    """The file is there and has its size."""
    path = commit_files(checkpoints, 5, *PARTS)
    outside = checkpoints / "notes.txt"
    outside.write_text("mine")
    marker = json.loads((path / MARKER).read_text())
    for name in ("../notes.txt", str(outside)):
        content = marker | {"files": marker["files"] | {name: {"bytes": 4, "blake2b": protocol._digest(outside)}}}
        (path / MARKER).write_text(json.dumps(content))
        assert fault_of(path) == f"its {MARKER} marker is damaged"


def test_a_marker_without_files_is_a_fault(checkpoints):
    path = commit_files(checkpoints, 5, *PARTS)
    for item in path.iterdir():
        if item.name != MARKER:
            shutil.rmtree(item) if item.is_dir() else item.unlink()
    assert fault_of(path).endswith("is missing")


def test_a_rank_that_leaves_no_part_is_named_after_the_time_limit(checkpoints):
    before, claim = commit_files(checkpoints, 1, *PARTS), claimed(checkpoints)
    target = Target(checkpoints, 2, claim.number)
    write_part(target, 1, text_writers(PARTS[1]))
    with pytest.raises(RuntimeError) as error:
        Committer(4, claim, None, wait_seconds=0.2).commit(target)
    assert str(error.value) == (
        f"step_2 is not committed: after 0 s no part of ranks 0, 2, 3 in {target.writing}; do all ranks see one"
        " --output_dir?"
    )
    assert find_checkpoint("latest", checkpoints)[0] == before


def test_waiting_ends_when_a_part_will_never_come(checkpoints):
    claim = claimed(checkpoints)
    committer = Committer(2, claim, None, wait_seconds=60)
    committer.given_up.set()
    with pytest.raises(RuntimeError, match="step_2 is not committed: a rank could not write its part"):
        committer.commit(Target(checkpoints, 2, claim.number))


@pytest.mark.parametrize(
    ("harm", "fault"),
    [
        (truncate, "rng_rank1.pt has 8 bytes in {writing}, 9 were written"),
        (Path.unlink, "rng_rank1.pt has no bytes in {writing}, 9 were written"),
        (
            lambda path: path.with_name("stranger").write_text("who"),
            "stranger has 3 bytes in {writing}, no were written",
        ),
    ],
)
def test_what_is_not_as_the_ranks_wrote_it_is_not_committed(harm, fault, checkpoints):
    claim = claimed(checkpoints)
    target = Target(checkpoints, 2, claim.number)
    for rank, files in enumerate(PARTS):
        write_part(target, rank, text_writers(files))
    harm(target.writing / "rng_rank1.pt")
    with pytest.raises(RuntimeError) as error:
        Committer(2, claim, None, 1).commit(target)
    assert str(error.value) == f"step_2 is not committed: {fault.format(writing=target.writing)}"
    assert not target.path.exists()


def test_an_overtaken_run_commits_nothing(checkpoints):
    """The old ranks are still alive: they write, and the new run's checkpoints stay as they are."""
    old = claimed(checkpoints)
    commit_files(checkpoints, 1, *PARTS, claim=old)
    new = claimed(checkpoints)
    kept = commit_files(checkpoints, 2, *PARTS, claim=new)
    content = {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()}
    for step in (2, 3):
        with pytest.raises(Overtaken, match="this process holds claim 1, writes nothing more there and stops"):
            commit_files(checkpoints, step, *PARTS, claim=old, keep=1)
        assert {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()} == content
    assert {path.name for path in checkpoints.iterdir() if "." not in path.name} == {"step_1", "step_2"}


def test_an_overtaken_run_whose_files_were_cleaned_up_says_why(checkpoints):
    old = claimed(checkpoints)
    target = Target(checkpoints, 1, old.number)
    write_part(target, 0, text_writers(PARTS[0]))
    claimed(checkpoints)
    remove_leftovers(checkpoints)
    with pytest.raises(Overtaken):
        Committer(1, old, None, wait_seconds=60).commit(target)


def test_a_run_that_is_overtaken_between_rename_and_marker_leaves_no_marker(checkpoints, monkeypatch):
    old = claimed(checkpoints)
    original = Path.rename

    def rename(path: Path, to: Path) -> Path:
        result = original(path, to)
        if path.name == "step_1.writing-1":
            claimed(checkpoints)
        return result

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(Overtaken):
        commit_files(checkpoints, 1, *PARTS, claim=old)
    assert remove_leftovers(checkpoints) == ["step_1"]


def test_an_unusable_checkpoint_of_the_same_step_makes_room(checkpoints):
    path = commit_files(checkpoints, 5, *PARTS)
    truncate(path / "rng_rank0.pt")
    commit_files(checkpoints, 5, {"state.json": "new"})
    assert fault_of(path) is None and (path / "state.json").read_text() == "new"
    assert [item.name for item in checkpoints.iterdir()] == ["step_5"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


BIG = torch.ones(2**18)  # 1 MiB
WRITERS = {
    "text": lambda path: path.write_text("x" * 2**20),
    "torch": torch_writer({"flat": BIG}),
    "safetensors": lambda path: save_file({"flat": BIG}, path),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_stops_the_save_and_leaves_the_last_commit(kind, small_disk):
    checkpoints = small_disk / "checkpoints"
    before, claim = commit_files(checkpoints, 1, *PARTS), claimed(checkpoints)
    target = Target(checkpoints, 2, claim.number)
    with pytest.raises(RuntimeError) as error:
        write_part(target, 0, {"big": WRITERS[kind]})
    assert str(error.value).startswith(f"checkpoint {target.path} cannot be written, ")
    assert str(error.value).endswith("; step_1 is untouched, continue it with --resume_from_checkpoint")
    assert find_checkpoint("latest", checkpoints) == (before, []) and damage_of(before) is None
    assert remove_leftovers(checkpoints) == ["step_2.writing-2"]
    commit_files(checkpoints, 2, *PARTS)


def test_a_read_only_file_system_stops_the_save_and_leaves_the_last_commit(small_disk):
    checkpoints = small_disk / "checkpoints"
    before, claim = commit_files(checkpoints, 1, *PARTS), claimed(checkpoints)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    target = Target(checkpoints, 2, claim.number)
    with pytest.raises(RuntimeError, match=r"cannot be written, .* Read-only file system: .* step_1 is untouched"):
        write_part(target, 0, text_writers(PARTS[0]))
    assert find_checkpoint("latest", checkpoints) == (before, [])


def test_a_disk_that_fills_up_before_the_marker_leaves_the_last_commit(checkpoints, monkeypatch):
    before = commit_files(checkpoints, 1, *PARTS)
    original = protocol._write_synced

    def write(path: Path, content: dict) -> None:
        if path.name == MARKER:
            raise OSError(28, "No space left on device", str(path))
        original(path, content)

    monkeypatch.setattr(protocol, "_write_synced", write)
    with pytest.raises(RuntimeError, match=r"No space left on device: .*; step_1 is untouched"):
        commit_files(checkpoints, 2, *PARTS, keep=1)
    assert find_checkpoint("latest", checkpoints)[0] == before


@pytest.fixture
def stuck(monkeypatch):
    """A file called stuck.pt cannot be deleted; permissions do not hold root back."""
    unlink = os.unlink

    def refuse(path, *args, **kwargs):
        if Path(path).name == "stuck.pt":
            raise PermissionError(1, "Operation not permitted", str(path))
        unlink(path, *args, **kwargs)

    monkeypatch.setattr(os, "unlink", refuse)


def test_an_old_checkpoint_that_cannot_be_deleted_ends_no_run(checkpoints, stuck, capsys):
    claim = claimed(checkpoints)
    commit_files(checkpoints, 1, {"state.json": "1", "deepspeed/stuck.pt": "x"}, keep=1, claim=claim)
    for step in (2, 3):
        commit_files(checkpoints, step, {"state.json": str(step)}, keep=1, claim=claim)
    old = checkpoints / "step_1"
    line = f"warning: {old / 'deepspeed/stuck.pt'} cannot be deleted: Operation not permitted; delete {old} yourself\n"
    assert capsys.readouterr().err == line
    assert find_checkpoint("latest", checkpoints)[0] == checkpoints / "step_3"
    assert {path.name for path in checkpoints.iterdir()} == {"step_1", "step_3"} and not (old / MARKER).exists()
    (checkpoints / "step_4.writing-1").mkdir()
    assert remove_leftovers(checkpoints) == ["step_4.writing-1"], "the next start goes on"
    assert capsys.readouterr().err == line
    assert fault_of(commit_files(checkpoints, 1, {"state.json": "again"})) is None


def test_of_a_linked_checkpoint_only_the_link_is_deleted(checkpoints, tmp_path):
    claim = claimed(checkpoints)
    kept = commit_files(checkpoints, 1, *PARTS, claim=claim).rename(tmp_path / "archive")
    (checkpoints / "step_1").symlink_to(kept)
    (checkpoints / "step_9").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    commit_files(checkpoints, 2, *PARTS, keep=1, claim=claim)
    assert fault_of(kept) is None and damage_of(kept) is None
    assert remove_leftovers(checkpoints) == []
    assert {path.name for path in checkpoints.iterdir()} == {"step_2", "step_9"}
