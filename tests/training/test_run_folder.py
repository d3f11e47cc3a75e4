"""The run folder: free or taken, what is written, what a resumed or repeated run keeps."""

import json
import os
import tracemalloc
from pathlib import Path

import pytest
import yaml

from comol_ds.config import RunConfig, RunSettings
from comol_ds.errors import UserError
from comol_ds.output_folder import RUN_MARK
from comol_ds.training.generation import Overtaken, claim_generation
from comol_ds.training.log_files import append_json_line
from comol_ds.training.run_folder import WRITTEN, RunFolder
from tests.committed_files import commit_files


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
    folder.take()
    (folder.checkpoints / "step_5.writing-1").mkdir(parents=True)
    folder.check_free(overwrite=False)


def test_checkpoints_of_an_earlier_run_take_it(folder):
    folder.take()
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


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_no_run_has_written_is_never_touched(name, folder):
    """Whatever a run writes, a user may have had under that name; a start says so, and so does a resume."""
    path = folder.path / name if "." in name or name == "STOP" else folder.path / name / "step_100" / "model.pt"
    path.parent.mkdir(parents=True)
    path.write_text("written by hand")
    message = rf"{folder.path} is no run folder, and {folder.path / name} would be overwritten; move it elsewhere"
    for ask in (lambda: folder.check_free(overwrite=False), folder.check_ours, folder.take):
        with pytest.raises(UserError, match=message):
            ask()
    with pytest.raises(UserError, match=r"is not empty and has no \.comol_run, the mark of an earlier run"):
        folder.check_free(overwrite=True)
    assert list(contents(folder.path).values()) == ["written by hand"]


def test_a_folder_with_other_files_is_not_one_to_overwrite(folder):
    folder.path.mkdir(parents=True)
    (folder.path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="choose another --output_dir or empty it yourself"):
        folder.check_free(overwrite=True)
    folder.check_free(overwrite=False)
    folder.take()
    folder.check_free(overwrite=True)
    assert contents(folder.path).keys() == {"notes.txt", RUN_MARK}


def test_a_mark_that_we_have_not_written_marks_nothing(folder):
    folder.path.mkdir(parents=True)
    (folder.path / RUN_MARK).write_text("my notes on the comol run")
    with pytest.raises(UserError, match="has no"):
        folder.check_free(overwrite=True)


@pytest.mark.parametrize("state", ['{"step": 5, "identity": {}}', '{"step": 5}', "[]", "weights"])
def test_a_run_from_before_there_were_marks_is_known_by_claim_and_state(state, folder):
    commit_files(folder.checkpoints, 5, {"state.json": state})
    if "identity" not in state:
        with pytest.raises(UserError, match="is no run folder"):
            folder.check_ours()
        return
    folder.check_ours()
    with pytest.raises(UserError, match="holds checkpoints of an earlier run"):
        folder.check_free(overwrite=False)
    folder.check_free(overwrite=True)
    for claim in folder.generations.iterdir():
        claim.unlink()
    with pytest.raises(UserError, match="is no run folder"):
        folder.check_ours()


def test_the_adapter_of_a_finished_run_is_not_trained_over(folder):
    folder.take()
    folder.adapter.mkdir()
    (folder.adapter / "adapter_config.json").write_text("{}")
    for ask in (lambda: folder.check_free(overwrite=False), folder.check_unfinished):
        with pytest.raises(UserError, match="holds the adapter of an earlier run and no checkpoint to continue"):
            ask()
    folder.check_free(overwrite=True)


@pytest.mark.parametrize("name", ["checkpoints", "adapter", "tensorboard"])
def test_a_linked_folder_is_not_overwritten(name, folder, tmp_path):
    folder.take()
    target = tmp_path / "elsewhere"
    (target / "step_5").mkdir(parents=True)
    (target / "step_5" / "COMMITTED").write_text("{}")
    (folder.path / name).symlink_to(target)
    with pytest.raises(UserError) as error:
        folder.check_free(overwrite=True)
    assert str(error.value) == (
        f"--overwrite_output_dir: {folder.path / name} is a link to {target}, where nothing is deleted; delete the link"
        " yourself or choose another --output_dir"
    )
    assert contents(target) == {"step_5/COMMITTED": "{}"}


@pytest.fixture
def stuck(monkeypatch):
    """A file called stuck cannot be deleted; permissions do not hold root back."""
    unlink = os.unlink

    def refuse(path, *args, **kwargs):
        if Path(path).name == "stuck":
            raise PermissionError(1, "Operation not permitted", str(path))
        unlink(path, *args, **kwargs)

    monkeypatch.setattr(os, "unlink", refuse)


def test_an_overwrite_that_cannot_delete_everything_fails(folder, stuck):
    folder.take()
    (folder.checkpoints / "step_5").mkdir(parents=True)
    (folder.checkpoints / "step_5" / "stuck").write_text("x")
    (folder.path / "config.yaml").write_text("old: settings")
    with pytest.raises(UserError) as error:
        folder.prepare(config(folder, overwrite=True), {}, from_step=0)
    assert str(error.value) == (
        f"--overwrite_output_dir: {folder.checkpoints / 'step_5' / 'stuck'} cannot be deleted: Operation not permitted;"
        " delete it yourself or choose another --output_dir"
    )
    assert (folder.path / "config.yaml").read_text() == "old: settings", "what is there is still the old run"


@pytest.mark.parametrize("name", ["adapter", "config.yaml", "checkpoints/step_5", "generations.jsonl"])
@pytest.mark.parametrize("by_link", [False, True])
def test_what_is_read_is_not_what_is_written(name, by_link, folder, tmp_path):
    path = folder.path / name
    path.mkdir(parents=True)
    given = path
    if by_link:
        given = tmp_path / "link"
        given.symlink_to(path)
    with pytest.raises(UserError, match=rf"holds {given}, which is read; choose another --output_dir"):
        folder.check_inputs(["gpt2", given], resumes=False)
    if name == "config.yaml":  # a resumed run is given its own settings
        folder.check_inputs([given], resumes=True)
    folder.check_inputs(["gpt2", folder.path.parent, folder.path / "data.jsonl"], resumes=False)


def test_logs_are_cut_line_by_line(folder):
    folder.path.mkdir(parents=True)
    line = json.dumps({"step": 1, "layers": "x" * 1000}) + "\n"
    folder.router_load.write_text(line * 10_000 + line.replace("1", "2", 1) * 2000)
    folder.evaluations.write_text(line * 10_000)
    tracemalloc.start()
    try:
        folder.prepare(config(folder), {}, from_step=1)
        assert folder.was_evaluated(1) and not folder.was_evaluated(2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert folder.router_load.read_text() == line * 10_000
    assert peak < 1_000_000, "of logs of 22 MB"


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_start_that_is_killed_while_it_cuts_the_logs_leaves_them(call, folder, monkeypatch):
    write_logs(folder, [1, 2, 3])
    before = folder.metrics.read_bytes()

    original = getattr(os, call)

    def killed(file, *more):
        name = Path(f"/proc/self/fd/{file}").readlink() if call == "fsync" else Path(file)
        if name.name.startswith("metrics.jsonl"):
            raise KeyboardInterrupt
        return original(file, *more)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, killed)
        with pytest.raises(KeyboardInterrupt):
            folder.prepare(config(folder), {}, from_step=2)
    assert folder.metrics.read_bytes() == before
    (folder.path / "metrics.jsonl.partial").write_text("left by the one that was killed")
    folder.prepare(config(folder), {}, from_step=2)
    assert {tuple(steps) for steps in logged_steps(folder)} == {(1, 2)} and not list(folder.path.glob("*.partial"))


def test_logs_and_settings_are_not_written_through_the_links_of_a_copy(folder, tmp_path):
    """`cp -al` copies a run folder in no time and no space."""
    write_logs(folder, [1, 2])
    (folder.path / "config.yaml").write_text("of: the other run")
    (tmp_path / "copy").mkdir()
    for path in folder.path.iterdir():
        os.link(path, tmp_path / "copy" / path.name)
    before = contents(tmp_path / "copy")
    folder.prepare(config(folder), {}, from_step=2)
    append_json_line(folder.metrics, {"step": 3})
    assert contents(tmp_path / "copy") == before
