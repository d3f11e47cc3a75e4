"""The run folder: free or taken, what is written, what a resumed or repeated run keeps."""

import json
from pathlib import Path

import pytest
import yaml

from comol_ds.config import RunConfig, RunSettings
from comol_ds.errors import UserError
from comol_ds.training.generation import Overtaken, claim_generation
from comol_ds.training.run_folder import RunFolder, append_json_line


@pytest.fixture
def folder(tmp_path):
    return RunFolder(str(tmp_path / "runs" / "out"))


def config(folder: RunFolder, overwrite: bool = False) -> RunConfig:
    return RunConfig(run=RunSettings(output_dir=str(folder.path), overwrite_output_dir=overwrite))


def write_logs(folder: RunFolder, steps: list[int]) -> None:
    folder.path.mkdir(parents=True, exist_ok=True)
    for log in logs(folder):
        for step in steps:
            append_json_line(log, {"step": step, "value": step / 3})


def logs(folder: RunFolder) -> list[Path]:
    return [folder.metrics, folder.router_load, folder.evaluations, folder.answers]


def logged_steps(folder: RunFolder) -> list[list[int]]:
    return [[json.loads(line)["step"] for line in log.read_text().splitlines()] for log in logs(folder)]


def test_a_new_or_foreign_folder_is_free(folder):
    folder.check_free(overwrite=False)
    assert not folder.path.exists()
    folder.path.mkdir(parents=True)
    (folder.path / "notes.txt").write_text("mine")
    folder.checkpoints.mkdir()
    folder.check_free(overwrite=False)


def test_what_an_interrupted_first_save_left_does_not_take_it(folder):
    (folder.checkpoints / "step_5.writing-1").mkdir(parents=True)
    folder.check_free(overwrite=False)


def test_checkpoints_of_an_earlier_run_take_it(folder):
    (folder.checkpoints / "step_5").mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds checkpoints .* --resume_from_checkpoint.*--overwrite_output_dir"):
        folder.check_free(overwrite=False)
    folder.check_free(overwrite=True)
    assert (folder.checkpoints / "step_5").is_dir()  # asking deletes nothing


def test_a_file_on_the_way_takes_it(folder, tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(UserError, match="runs is a file; choose a folder"):
        folder.check_writable()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="link is a file; choose a folder"):
        RunFolder(str(tmp_path / "link")).check_writable()


@pytest.mark.parametrize("path", ["/proc/out", "/proc/self", "x" * 300])
def test_a_folder_in_which_nothing_can_be_written(path):
    """Tried, not asked for: root may write everywhere, and cannot write there."""
    with pytest.raises(UserError, match=r"^--output_dir \S+ cannot be written: [A-Z][^;]+; choose another folder$"):
        RunFolder(path).check_writable()


def test_trying_leaves_nothing(folder):
    folder.checkpoints.mkdir(parents=True)
    folder.check_writable()
    assert [path.name for path in folder.path.rglob("*")] == ["checkpoints"]


def test_prepare_writes_the_resolved_settings(folder):
    settings = config(folder)
    folder.prepare(settings, {"train_batch_size": 8}, from_step=0)
    assert yaml.safe_load((folder.path / "config.yaml").read_text()) == settings.flat()
    assert json.loads((folder.path / "ds_config.json").read_text()) == {"train_batch_size": 8}
    assert sorted(path.name for path in folder.path.iterdir()) == ["config.yaml", "ds_config.json"]


def test_resuming_drops_the_lines_after_the_checkpoint(folder):
    write_logs(folder, [1, 2, 3, 4, 5])
    folder.prepare(config(folder), {}, from_step=3)
    assert logged_steps(folder) == [[1, 2, 3]] * 4
    append_json_line(folder.metrics, {"step": 4})
    assert logged_steps(folder)[0] == [1, 2, 3, 4]
    folder.prepare(config(folder), {}, from_step=0)
    assert logged_steps(folder) == [[]] * 4


def test_resuming_drops_a_half_written_last_line(folder):
    write_logs(folder, [1, 2])
    with folder.metrics.open("a") as file:
        file.write('{"step": 3, "lo')
    folder.prepare(config(folder), {}, from_step=3)
    assert logged_steps(folder)[0] == [1, 2]
    append_json_line(folder.metrics, {"step": 3})
    assert logged_steps(folder)[0] == [1, 2, 3]


def test_answers_whose_evaluation_was_not_written_are_dropped(folder):
    write_logs(folder, [1, 2])
    append_json_line(folder.answers, {"step": 3})
    folder.prepare(config(folder), {}, from_step=3)
    assert logged_steps(folder)[-1] == [1, 2], "the evaluation of step 3 is made again, and writes them again"


def test_starting_anew_keeps_no_evaluation_of_before_the_first_step(folder):
    write_logs(folder, [0])
    folder.prepare(config(folder), {}, from_step=0)
    assert logged_steps(folder) == [[]] * 4


def test_kept_lines_are_the_same_bytes(folder):
    write_logs(folder, [1, 2])
    before = folder.metrics.read_bytes()
    folder.prepare(config(folder), {}, from_step=2)
    assert folder.metrics.read_bytes() == before


def test_a_log_that_cannot_be_written_says_what_to_do(folder):
    with pytest.raises(RuntimeError) as error:
        append_json_line(folder.metrics, {"step": 1})
    assert str(error.value) == (
        f"{folder.metrics} cannot be written: [Errno 2] No such file or directory: '{folder.metrics}'; make room and"
        " continue with --resume_from_checkpoint"
    )


def test_overwriting_keeps_the_claims_so_that_an_older_process_stays_locked_out(folder):
    first = claim_generation(folder.generations)
    second = claim_generation(folder.generations)
    folder.prepare(config(folder, overwrite=True), {}, from_step=0)
    second.check()
    with pytest.raises(Overtaken):
        first.check()


def test_overwriting_deletes_the_run_and_nothing_else(folder):
    write_logs(folder, [1, 2])
    for name in ("checkpoints/step_5", "adapter", "tensorboard", "photos"):
        (folder.path / name).mkdir(parents=True)
        (folder.path / name / "file").write_text("content")
    (folder.path / "notes.txt").write_text("mine")
    folder.prepare(config(folder, overwrite=True), {}, from_step=0)
    assert sorted(path.name for path in folder.path.iterdir()) == [
        "config.yaml",
        "ds_config.json",
        "notes.txt",
        "photos",
    ]
    assert (folder.path / "photos" / "file").read_text() == "content"
