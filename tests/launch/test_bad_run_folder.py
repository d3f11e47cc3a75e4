"""Run folders and checkpoints that a run refuses: one line, exit code 2, before the model, nothing written."""

import json
from dataclasses import asdict

import pytest

from comol_ds.checkpoint_names import MARKER
from comol_ds.config_parser import parse_run_config
from comol_ds.parallel.groups import World
from comol_ds.training.plan import plan_run
from tests.committed_files import commit_files
from tests.data.data_helpers import sums, write_jsonl


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("adapter_name_or_path", "adapter"),
        ("model_name_or_path", "checkpoints/step_1/model"),
        ("tokenizer_name", "adapter"),
        ("dataset", "generations.jsonl"),
        ("eval_dataset", "evaluations.jsonl"),
        ("tp_plan", "stacks/plan.json"),
        ("config", "config.yaml"),
        ("ds_config", "ds_config.json"),
    ],
)
def test_an_input_that_the_run_would_delete_or_overwrite(flag, name, message, inputs):
    path = inputs.out / name
    path.parent.mkdir(parents=True)
    if path.suffix:
        path.write_text((inputs.ds_json() if flag == "ds_config" else inputs.write("c.yaml", "seed: 1")).read_text())
    else:
        path.mkdir()
    found = message("--overwrite_output_dir", **{flag: path})
    held = inputs.out / name.split("/")[0]
    assert found == f"{held} holds {path}, which is read; choose another --output_dir"


def test_what_a_user_has_written_by_hand(message, inputs):
    inputs.out.mkdir()
    (inputs.out / "metrics.jsonl").write_text("by hand")
    left = f"{inputs.out / 'metrics.jsonl'} would be overwritten; move it elsewhere or choose another folder"
    assert message() == f"--output_dir {inputs.out} is no run folder, and {left}"
    assert message("--resume_from_checkpoint").endswith(left)
    assert "has no .comol_run, the mark of an earlier run" in message("--overwrite_output_dir")


def test_a_run_in_its_own_data(message, inputs):
    inputs.out.mkdir()
    write_jsonl(inputs.out / "records.jsonl", sums(40))
    found = message(dataset=inputs.out)
    assert found.startswith(f"--output_dir {inputs.out} is a folder of data, where the run's logs would be read")
    assert found.endswith(f"choose another folder, {inputs.out / 'out'} for example")
    assert message(eval_dataset=inputs.out) == found


def test_output_dir_that_cannot_hold_a_run(message, inputs):
    inputs.write("file", "occupied")
    for path in (inputs.folder / "file", inputs.folder / "file" / "out"):
        assert message(output_dir=path) == f"--output_dir {path}: {inputs.folder / 'file'} is a file; choose a folder"


@pytest.fixture
def checkpoint(inputs):
    """A committed checkpoint of the run that `inputs.argv()` describes, in its run folder; not loadable."""
    plan = plan_run(parse_run_config(inputs.argv()), World(0, 1, 0))
    plan.folder.take()
    state = json.dumps({"step": 2, "identity": asdict(plan.identity), "router_losses": {}})
    return commit_files(plan.folder.checkpoints, 2, {"state.json": state})


def test_output_dir_of_another_run(message, inputs, checkpoint):
    found = message()
    assert found.startswith(f"--output_dir {inputs.out} holds checkpoints of an earlier run; continue it with")
    assert "--resume_from_checkpoint" in found and "--overwrite_output_dir" in found


OTHER_RUNS = [
    (["--r", "4"], "adapter.r = 16, this run has 4"),
    (["--num_experts", "2"], "adapter.num_experts = 8, this run has 2"),
    (["--target_modules", "q_proj"], "adapter.target_modules = ['q_proj', 'k_proj', "),
    (["--router", "input"], "adapter.router = core, this run has input"),
    (["--seed", "1"], "seed = 42, this run has 1"),
    (["--optim", "sgd"], "optim = adamw_torch, this run has sgd"),
    (["--per_device_train_batch_size", "4", "--global_batch_size", "16"], "global_batch = 8, this run has 16"),
]


@pytest.mark.parametrize("case", OTHER_RUNS, ids=lambda case: " ".join(case[0]))
def test_checkpoint_of_another_run(case, message, checkpoint):
    words, difference = case
    found = message("--resume_from_checkpoint", *words)
    assert found.startswith(f"checkpoint {checkpoint} was written with {difference}"), found
    assert "resume with the same setting or choose another --output_dir" in found


def test_checkpoint_of_another_world_without_its_global_batch(message, checkpoint, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert "was written with global_batch = 8, this run has 16" in message("--resume_from_checkpoint", checkpoint)


def test_a_named_checkpoint_that_is_not_committed(message, checkpoint):
    (checkpoint / MARKER).unlink()
    found = message("--resume_from_checkpoint", checkpoint)
    assert f"checkpoint {checkpoint} is not usable: it has no {MARKER} marker" in found
    assert "start anew with --overwrite_output_dir" in found


def test_committed_checkpoints_of_which_none_is_usable(message, checkpoint):
    (checkpoint / "state.json").write_text("{}")
    found = message("--resume_from_checkpoint")
    assert f"checkpoint {checkpoint} is not usable: state.json has 2 of" in found
    assert "start anew with --overwrite_output_dir" in found


def test_resume_from_what_is_no_checkpoint(message, inputs):
    found = message("--resume_from_checkpoint", inputs.folder)
    assert found.endswith("not a step_<n> folder; give one or latest")
