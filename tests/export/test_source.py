"""Which adapter an export starts from."""

import shutil

import pytest
import torch

from comol_ds.errors import UserError
from comol_ds.export.source import base_folder, find_adapter
from tests.trained_adapters import save_run


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    save_run(folder)
    return folder


def commit(run, step: int) -> None:
    """A committed checkpoint with an adapter whose every number is the step."""
    from safetensors.torch import load_file, save_file

    checkpoint = run / "checkpoints" / f"step_{step}"
    shutil.copytree(run / "adapter", checkpoint / "adapter")
    path = checkpoint / "adapter" / "adapter_model.safetensors"
    save_file({key: torch.full_like(tensor, step) for key, tensor in load_file(path).items()}, path)
    (checkpoint / "COMMITTED").touch()


def first_number(source) -> float:
    return next(iter(source.tensors.values())).flatten()[0].item()


def test_a_run_gives_its_final_adapter_and_its_settings(run):
    commit(run, 7)
    source = find_adapter(run)
    assert source.folder == run / "adapter" and source.run["max_length"] == 64
    assert source.base == str(run.parent / "model") == source.tokenizer
    assert source.config.r == 4 and len(source.tensors) == 4 * 2 * 5


def test_a_run_that_has_not_ended_gives_its_newest_committed_checkpoint(run):
    for step in (90, 100):
        commit(run, step)
    commit(run, 200)
    (run / "checkpoints" / "step_200" / "COMMITTED").unlink()
    shutil.rmtree(run / "adapter")
    source = find_adapter(run)
    assert source.folder == run / "checkpoints" / "step_100" / "adapter" and first_number(source) == 100
    assert source.run["seed"] == 1


def test_other_folders_beside_the_checkpoints_are_passed_over(run):
    for step in (2, 10):
        commit(run, step)
    for name in ("step_2_best", "step_99.replaced-1", "step_²", "step_", "step_-3", "step_latest"):
        shutil.copytree(run / "checkpoints" / "step_2", run / "checkpoints" / name)
    (run / "checkpoints" / "step_300").write_text("a file")
    shutil.rmtree(run / "adapter")
    assert find_adapter(run).folder == run / "checkpoints" / "step_10" / "adapter"
    assert first_number(find_adapter(run / "checkpoints" / "step_2_best")) == 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("- a\n- b\n", "it holds no 'flag: value' lines"),
        ("", "it holds no 'flag: value' lines"),
        ("tokenizer_name: [a]\n", "tokenizer_name is ['a'], no folder or hub name"),
    ],
)
def test_settings_that_no_run_wrote_are_refused(run, text, reason):
    (run / "config.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        find_adapter(run)
    assert str(error.value) == f"{run / 'config.yaml'} cannot be read as a run's settings: {reason}"


@pytest.mark.parametrize("text", ["- a\n", "dataset: [1]\n"])
def test_another_program_s_file_of_that_name_is_none_of_a_run(run, text, tmp_path):
    adapter = shutil.copytree(run / "adapter", tmp_path / "hub" / "adapters" / "mine")
    (tmp_path / "hub" / "config.yaml").write_text(text)
    assert find_adapter(adapter).run is None


def test_a_base_that_no_disk_can_name_is_refused_in_one_line(run):
    with pytest.raises(UserError) as error:
        base_folder("x" * 5000)
    assert "\n" not in str(error.value) and "give --model_name_or_path" in str(error.value)


def test_a_checkpoint_or_an_adapter_folder_is_taken_itself(run, tmp_path):
    commit(run, 90)
    assert first_number(find_adapter(run / "checkpoints" / "step_90")) == 90
    shutil.copytree(run / "adapter", tmp_path / "elsewhere" / "deep" / "copy")
    source = find_adapter(tmp_path / "elsewhere" / "deep" / "copy", base="another/base")
    assert source.run is None and source.base == "another/base"


def test_the_tokenizer_of_the_run_comes_before_the_base_model_s(run):
    (run / "config.yaml").write_text("tokenizer_name: some/tokenizer\n")
    assert find_adapter(run).tokenizer == "some/tokenizer"


def test_bad_input(run, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError) as error:
        find_adapter(empty)
    assert str(error.value) == (
        f"{empty} holds no adapter: neither adapter_config.json and adapter_model.safetensors, nor adapter/, nor a"
        " committed checkpoint"
    )
    with pytest.raises(UserError) as error:
        find_adapter(tmp_path / "nowhere")
    assert str(error.value) == f"{tmp_path / 'nowhere'} is not a folder; give a run's --output_dir or an adapter folder"
    config = run / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(f'"{run.parent / "model"}"', "null"))
    with pytest.raises(UserError) as error:
        find_adapter(run)
    assert str(error.value) == f"{config} names no base model; give --model_name_or_path"
    with pytest.raises(
        UserError, match="base model 'no/such/base' is neither a folder nor available from the hub; give --"
    ):
        base_folder("no/such/base")
