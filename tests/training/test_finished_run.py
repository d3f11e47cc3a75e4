"""When a continued run has nothing left to do: its last checkpoint's adapter and evaluation lie in the run folder."""

import json
import shutil
from types import SimpleNamespace

import pytest

from comol_ds.parallel.groups import World
from comol_ds.training.identity import Difference
from comol_ds.training.resume import Resume
from comol_ds.training.run_folder import RunFolder
from comol_ds.training.set_up import is_finished

STEPS = 4


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(str(tmp_path / "out"))
    stored = folder.checkpoints / f"step_{STEPS}" / "adapter"
    # a tokenizer with several templates has a folder of them
    for name in ("adapter_model.safetensors", "additional_chat_templates/tool_use.jinja"):
        (stored / name).parent.mkdir(parents=True, exist_ok=True)
        (stored / name).write_text(name)
    shutil.copytree(stored, folder.adapter)
    folder.evaluations.write_text(json.dumps({"step": STEPS}) + "\n")
    return folder


def finished(folder, rank: int = 0, step: int = STEPS, is_own: bool = True) -> bool:
    found = Resume(folder.checkpoints / f"step_{STEPS}", step, Difference(), is_own)
    plan = SimpleNamespace(world=World(rank, 1, rank), folder=folder, resume=found, start_step=step)
    return is_finished(plan, SimpleNamespace(validation=["a record"]), STEPS)


def test_all_is_done(folder):
    assert finished(folder)


def test_steps_are_left(folder):
    assert not finished(folder, step=STEPS - 1)


def test_another_runs_checkpoint_is_where_this_run_begins(folder):
    assert not finished(folder, is_own=False)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "additional_chat_templates/tool_use.jinja"])
def test_a_file_of_the_adapter_is_missing_or_another(folder, name):
    (folder.adapter / name).write_text("another")
    assert not finished(folder)
    (folder.adapter / name).unlink()
    assert not finished(folder)


def test_the_evaluation_is_missing(folder):
    folder.evaluations.unlink()
    assert not finished(folder)


def test_rank_0_looks_for_all(folder):
    """Another node may not see the checkpoint yet, and must not fail for that."""
    shutil.rmtree(folder.checkpoints)
    assert not finished(folder, rank=1)
