"""Which checkpoints are found, by which route they are continued, and which are deleted; no engine."""

import json
import os
from pathlib import Path

import pytest

from comol_ds.checkpoint_names import MARKER
from comol_ds.errors import UserError
from comol_ds.training.commit import fault_of, remove_leftovers
from comol_ds.training.identity import RunIdentity
from comol_ds.training.resume import Resume, find_checkpoint, read_checkpoint
from comol_ds.training.run_folder import RunFolder
from tests.committed_files import claimed, commit_files

IDENTITY = {
    "world_size": 2, "tensor_parallel": 1, "zero_stage": 3, "bf16": False, "global_batch": 8, "micro_batch": 4,
    "seed": 1, "optim": "adamw_torch", "model": "m", "data": {"dataset": ["d"]}, "adapter": {"r": 4},
    "router_losses": {}, "tp_plan": None, "deepspeed": {"zero_optimization": {"sub_group_size": 100}},
    "settings": {"learning_rate": 1e-3, "max_steps": 9},
}  # fmt: skip
# of the run that wrote it; another one learns its own when it has prepared its data
CONTENT = {"data_content": {"dataset 'd'": "3 records, ab"}, "base_weights": "9 bytes, ff"}


@pytest.fixture(autouse=True)
def no_flush(monkeypatch):
    """Flushing takes 10 ms a call here, and what it does shows only when the power goes."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def commit(folder: Path, *steps: int, keep: int | None = None) -> list[Path]:
    return [
        commit_files(
            folder,
            step,
            {
                "state.json": json.dumps({"step": step, "identity": IDENTITY | CONTENT, "router_losses": {}}),
                "rng_rank0.pt": "r" * 40,
                "deepspeed/optimizer.pt": "o" * 100,
            },
            keep=keep,
        )
        for step in steps
    ]


def read(checkpoint: Path, **changes) -> Resume:
    """As a run with these changes would continue a checkpoint of its own folder."""
    return read_checkpoint(checkpoint, RunIdentity(**IDENTITY | changes), RunFolder(str(checkpoint.parents[1])))


def uncommitted(folder: Path, step: int) -> Path:
    """Renamed, not yet marked: the run ended in between."""
    (target,) = commit(folder, step)
    (target / MARKER).unlink()
    return target


def steps_in(folder: Path) -> set[int]:
    return {int(path.name.removeprefix("step_")) for path in folder.glob("step_*")}


def test_latest_is_the_highest_step(tmp_path):
    commit(tmp_path, 9, 100, 10)
    (tmp_path / "step_final").mkdir()
    (tmp_path / "step_200").write_text("a file")
    (tmp_path / "step_300.writing-1").mkdir()
    assert find_checkpoint("latest", tmp_path) == (tmp_path / "step_100", [])


def test_nothing_to_resume_is_no_error(tmp_path):
    assert find_checkpoint("latest", tmp_path / "checkpoints") == (None, [])


def test_latest_falls_back_and_says_so(tmp_path):
    _, second, third = commit(tmp_path, 1, 2, 3)
    uncommitted(tmp_path, 4)
    (third / "rng_rank0.pt").write_text("r")
    found, passed_over = find_checkpoint("latest", tmp_path)
    assert found == second
    assert passed_over == [
        f"checkpoint {tmp_path}/step_4 is not usable: it has no {MARKER} marker, the save did not finish",
        f"checkpoint {tmp_path}/step_3 is not usable: rng_rank0.pt has 1 of 40 bytes",
    ]


def test_what_was_found_damaged_is_passed_over(tmp_path):
    first, second = commit(tmp_path, 1, 2)
    found, passed_over = find_checkpoint("latest", tmp_path, {second: "the content of x is not what was written"})
    assert found == first
    assert passed_over == [f"checkpoint {second} is not usable: the content of x is not what was written"]


def test_a_named_checkpoint_falls_back_to_earlier_ones_only(tmp_path):
    first, second, third = commit(tmp_path, 1, 2, 3)
    assert find_checkpoint(str(second), tmp_path / "elsewhere") == (second, [])
    (second / "state.json").unlink()
    found, passed_over = find_checkpoint(f"{second}/", tmp_path / "elsewhere")
    assert found == first
    assert passed_over == [f"checkpoint {second} is not usable: state.json is missing"]
    assert fault_of(third) is None


def test_a_run_that_ended_inside_its_first_save_starts_anew(tmp_path):
    target = uncommitted(tmp_path, 2)
    found, passed_over = find_checkpoint("latest", tmp_path)
    assert found is None
    assert passed_over == [f"checkpoint {target} is not usable: it has no {MARKER} marker, the save did not finish"]
    with pytest.raises(UserError, match=r"step_2 is not usable: .* no committed checkpoint is left, start anew with"):
        find_checkpoint(str(target), tmp_path)


def test_a_run_whose_committed_checkpoints_are_all_damaged_does_not_start_anew(tmp_path):
    first, second = commit(tmp_path, 1, 2)
    for path in (first, second):
        (path / "rng_rank0.pt").unlink()
    with pytest.raises(UserError, match=r"step_2 is not usable: rng_rank0.pt is missing; no committed checkpoint is"):
        find_checkpoint("latest", tmp_path)


def test_a_path_that_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"step_7: no such folder; give a step_<n> folder or latest"):
        find_checkpoint(str(tmp_path / "step_7"), tmp_path)
    with pytest.raises(UserError, match=r"not a step_<n> folder; give one or latest"):
        find_checkpoint(str(tmp_path), tmp_path)


def test_the_same_layout_continues_from_deepspeeds_own_files(tmp_path):
    (target,) = commit(tmp_path / "checkpoints", 7)
    resume = read(target)
    assert (resume.path, resume.step, resume.difference.moved) == (target, 7, [])
    assert resume.route == "by DeepSpeed's own files (same layout)"


@pytest.mark.parametrize(
    ("changes", "moved"),
    [
        ({"world_size": 1}, "world_size 2 -> 1"),
        ({"tensor_parallel": 2}, "tensor_parallel 1 -> 2"),
        ({"zero_stage": 2}, "zero_stage 3 -> 2"),
        ({"micro_batch": 1}, "micro_batch 4 -> 1"),
        ({"world_size": 4, "tensor_parallel": 2}, "world_size 2 -> 4, tensor_parallel 1 -> 2"),
        ({"tp_plan": "plan.json"}, "tp_plan None -> plan.json"),
        (
            {"deepspeed": {"zero_optimization": {"sub_group_size": 10}}},
            "deepspeed.zero_optimization.sub_group_size 100 -> 10",
        ),
        (
            {"zero_stage": 2, "deepspeed": {"zero_optimization": {"overlap_comm": True}}},
            "zero_stage 3 -> 2",
        ),
        (
            {"deepspeed": {"zero_optimization": {}}},
            "deepspeed.zero_optimization.sub_group_size 100 -> None",
        ),
    ],
    ids=str,
)
def test_another_layout_continues_from_the_canonical_state(changes, moved, tmp_path):
    (target,) = commit(tmp_path / "checkpoints", 7)
    resume = read(target, **changes)
    assert resume.route == f"by the canonical state (another layout: {moved}; dropout draws new masks)"


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"global_batch": 16}, "global_batch = 8, this run has 16"),
        ({"seed": 2}, "seed = 1, this run has 2"),
        ({"bf16": True}, "bf16 = False, this run has True"),
        ({"optim": "sgd"}, "optim = adamw_torch, this run has sgd"),
        ({"model": "other"}, "model = m, this run has other"),
        ({"adapter": {"r": 8}}, "adapter.r = 4, this run has 8"),
        ({"data": {"dataset": ["e"]}}, "data.dataset = ['d'], this run has ['e']"),
        ({"world_size": 1, "seed": 2}, "seed = 1, this run has 2"),
    ],
    ids=str,
)
def test_another_run_is_refused(changes, difference, tmp_path):
    (target,) = commit(tmp_path / "checkpoints", 7)
    with pytest.raises(UserError) as error:
        read(target, **changes)
    assert str(error.value) == (
        f"checkpoint {target} was written with {difference};"
        " resume with the same setting or choose another --output_dir"
    )


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        (
            {"data_content": {"dataset 'd'": "3 records, cd"}},
            "data_content.dataset 'd' = 3 records, ab, this run has 3",
        ),
        ({"base_weights": "9 bytes, ee"}, "base_weights = 9 bytes, ff, this run has 9 bytes, ee"),
    ],
)
def test_other_content_under_the_same_name_is_refused(changes, difference, tmp_path):
    (target,) = commit(tmp_path / "checkpoints", 7)
    with pytest.raises(UserError) as error:
        read(target, **changes)
    assert f"was written with {difference}" in str(error.value)
    assert "; the content has changed under the same name: restore it or choose another --output_dir" in str(
        error.value
    )
    same = {"data_content": {"dataset 'd'": "3 records, ab"}, "base_weights": "9 bytes, ff"}
    assert read(target, **same).route == "by DeepSpeed's own files (same layout)"


def test_a_setting_that_may_change_is_said(tmp_path):
    (target,) = commit(tmp_path / "checkpoints", 7)
    resume = read(
        target, settings={"learning_rate": 1e-4, "max_steps": 9},
        deepspeed={"zero_optimization": {"sub_group_size": 100}, "communication_data_type": "fp32"},
    )  # fmt: skip
    assert resume.difference.changed == [
        "deepspeed.communication_data_type None -> fp32",
        "learning_rate 0.001 -> 0.0001",
    ]
    assert resume.is_native


def test_what_an_older_checkpoint_does_not_say_is_not_compared(tmp_path):
    older = {name: value for name, value in IDENTITY.items() if name not in ("tp_plan", "deepspeed", "settings")}
    del older["router_losses"]
    state = {"step": 7, "identity": older | {"data_content": None}, "router_losses": {}}
    target = commit_files(tmp_path / "checkpoints", 7, {"state.json": json.dumps(state)})
    content = {"data": {"dataset": ["d"], "streaming": False}, "data_content": {"dataset 'd'": "3 records, ab"}}
    resume = read(target, **content)
    assert resume.is_native
    assert resume.difference.unknown == [
        "data.streaming", "router_losses", "tp_plan", "deepspeed", "settings", "data_content"
    ]  # fmt: skip


def test_a_checkpoint_of_another_folder_continues_from_its_tensors_alone(tmp_path):
    """Also where a link makes it look like one of this run."""
    (target,) = commit(tmp_path / "theirs" / "checkpoints", 7)
    folder = RunFolder(str(tmp_path / "mine"))
    folder.checkpoints.mkdir(parents=True)
    (folder.checkpoints / "step_7").symlink_to(target)
    for path in (target, folder.checkpoints / "step_7"):
        resume = read_checkpoint(path, RunIdentity(**IDENTITY), folder)
        assert not resume.is_native
        assert resume.route == "by the canonical state (another run's folder; dropout draws new masks)"


def test_a_run_folder_on_another_disk_is_its_own(tmp_path):
    (target,) = commit(tmp_path / "disk", 7)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "checkpoints").symlink_to(tmp_path / "disk")
    resume = read_checkpoint(target, RunIdentity(**IDENTITY), RunFolder(str(tmp_path / "mine")))
    assert resume.is_native


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("{", "Expecting property name"),
        ("[]", "list indices must be integers"),
        ("[" * 100_000, "nested too deeply"),
        ('{"step": 7, "router_losses": {}, "identity": ' + '{"a":' * 990 + "1" + "}" * 990 + "}", ""),
        ('{"step": 8, "identity": {}, "router_losses": {}}', "step is 8"),
        ('{"step": true, "identity": {}, "router_losses": {}}', "step is True"),
        ('{"step": 7, "identity": [], "router_losses": {}}', "identity and router_losses must be objects"),
        ('{"identity": {}, "router_losses": {}}', "'step'"),
    ],
    ids=range(8),
)
def test_a_state_that_is_none_is_one_line(content, fault, tmp_path):
    target = commit_files(tmp_path / "checkpoints", 7, {"state.json": content})
    with pytest.raises(UserError) as error:
        read(target, adapter={"a": {"a": 1}})
    assert fault in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_the_limit_keeps_the_newest(tmp_path):
    commit(tmp_path, 1, 2, 3, keep=2)
    assert steps_in(tmp_path) == {2, 3}
    commit(tmp_path, 4, keep=1)
    assert steps_in(tmp_path) == {4}
    commit(tmp_path, 5, keep=None)
    assert steps_in(tmp_path) == {4, 5}


def test_an_uncommitted_checkpoint_neither_counts_nor_pushes_out_a_committed_one(tmp_path):
    commit(tmp_path, 1)
    uncommitted(tmp_path, 2)
    commit(tmp_path, 3, keep=2)
    assert steps_in(tmp_path) == {1, 2, 3}
    assert find_checkpoint("latest", tmp_path)[0] == tmp_path / "step_3"


def test_the_limit_never_deletes_what_was_just_committed(tmp_path):
    # continued from step 1 after the run had reached step 30
    commit(tmp_path, 20, 30)
    (target,) = commit(tmp_path, 2, keep=1)
    assert fault_of(target) is None
    assert steps_in(tmp_path) == {2, 30}


def test_the_next_run_deletes_what_interrupted_saves_have_left(tmp_path):
    (committed,) = commit(tmp_path, 1)
    uncommitted(tmp_path, 4)
    for name in ("step_2.writing-1", "step_3.replaced-12", "step_final", "step_5.bak"):
        (tmp_path / name / "deepspeed").mkdir(parents=True)
    claimed(tmp_path)
    assert remove_leftovers(tmp_path) == ["step_2.writing-1", "step_3.replaced-12", "step_4"]
    assert {path.name for path in tmp_path.iterdir()} == {"step_1", "step_final", "step_5.bak"}
    assert fault_of(committed) is None
