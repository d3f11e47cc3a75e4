"""A run without validation records: nothing is evaluated, logged or compared, and the end says so."""

from types import SimpleNamespace

from comol_ds.config import RunConfig
from comol_ds.config_parser import parse_run_config
from comol_ds.data.prepare import prepare_data
from comol_ds.demo import defaults_for
from comol_ds.training.describe import result_lines
from comol_ds.training.loop import evaluate_now
from comol_ds.training.run_folder import RunFolder
from comol_ds.training.set_up import task_labels
from tests.data.data_helpers import settings, sums, tiny_tokenizer, write_jsonl

NOTHING_HELD_OUT = ["--ds_config", "zero1.json", "--validation_split_percentage", "0"]


def test_nothing_is_evaluated_and_the_end_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [*sums(4, task="a"), *sums(3, task="b")]
    data = prepare_data(
        settings(write_jsonl(tmp_path / "x.jsonl", rows), validation_split_percentage=0), tiny_tokenizer(), seed=1
    )
    assert task_labels(data) == ["a", "b"]
    plan = SimpleNamespace(config=RunConfig(), grid=None, folder=RunFolder(str(tmp_path / "out")), start_step=0)
    evaluate_now(SimpleNamespace(plan=plan, data=data), step=3)  # without engine, logs or adapter it can do nothing
    printed = "\n".join(result_lines(plan, []))
    assert "no validation records, nothing was evaluated\n" in printed
    assert "held-out" not in printed and str(plan.folder.adapter) in printed


def test_the_embedded_default_has_no_validation_then_either():
    given = parse_run_config(NOTHING_HELD_OUT)
    config = parse_run_config(NOTHING_HELD_OUT, defaults_for(given))
    assert config.data.dataset and not config.data.has_validation and not config.run.eval_on_start
    default = parse_run_config(NOTHING_HELD_OUT[:2], defaults_for(parse_run_config(NOTHING_HELD_OUT[:2])))
    assert default.data.has_validation and default.run.eval_on_start
