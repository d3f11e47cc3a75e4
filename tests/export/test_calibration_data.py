"""What calibrates a static core, and what judges it."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import yaml

from comol_ds.adapters.kept_tokenizer import tokenizer_files, write_tokenizer_files
from comol_ds.errors import UserError
from comol_ds.export.source import find_adapter
from comol_ds.serving.calibration_data import calibration_and_test
from comol_ds.serving.inference import load_tokenizer
from tests.data.data_helpers import tiny_tokenizer
from tests.trained_adapters import save_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibration") / "run"
    save_run(folder, records=11)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def split(folder, entries=None, max_records=100):
    source = find_adapter(folder)
    return calibration_and_test(source, load_tokenizer(source), entries, max_records, batch_size=4)


def test_the_validation_split_is_divided_and_every_record_is_on_one_side(run):
    calibration, test = split(run)
    tokenizer = load_tokenizer(find_adapter(run))
    lines = [json.loads(line) for line in (run.parent / "validation.jsonl").read_text().splitlines()]
    texts = [line["prompt"] + line["completion"] for line in lines]
    halves = [
        [tokenizer.decode(ids, skip_special_tokens=True) for ids in part.records["input_ids"]]
        for part in (calibration, test)
    ]
    assert sorted(halves[0] + halves[1]) == sorted(texts)
    assert calibration.as_json()["data"] == "the run's validation split"
    assert split(run)[0].as_json() == calibration.as_json(), "the same halves every time"


def test_data_that_takes_its_tasks_in_turn_has_all_of_them_on_both_sides(run, tmp_path):
    data = tmp_path / "turns.jsonl"
    rows = [{"prompt": f"task {number % 6}:", "completion": f"{number}"} for number in range(120)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = load_tokenizer(find_adapter(run))
    for part in split(run, [str(data)], max_records=200):
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in part.records["input_ids"]]
        assert {text.split(":")[0] for text in texts} == {f"task {task}" for task in range(6)}


def test_batches_hold_every_token_once_and_no_filler_rows(run):
    calibration, _ = split(run)
    batches = list(calibration.batches())
    assert [len(batch["input_ids"]) for batch in batches] == [4, 2]
    assert sum(int(batch["attention_mask"].sum()) for batch in batches) == calibration.as_json()["tokens"]


def test_what_is_recorded_names_the_tokens(run):
    calibration, test = split(run)
    digest = hashlib.sha256()
    for ids in calibration.records["input_ids"]:
        digest.update(np.asarray([len(ids), *ids], dtype="<i8").tobytes())
    assert calibration.as_json()["sha256"] == digest.hexdigest() != test.as_json()["sha256"]
    assert (calibration.as_json()["records"], test.as_json()["records"]) == (6, 5)


def test_data_of_one_s_own_and_a_limit(run, tmp_path):
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps({"question": f"{n}?", "answer": "yes"}) + "\n" for n in range(9)))
    calibration, test = split(run, [str(data)], max_records=6)
    assert (calibration.as_json()["records"], test.as_json()["records"]) == (3, 3)
    assert calibration.name == str(data)


@pytest.mark.parametrize("asked", ["question", "ask", "prompt"])
def test_the_run_s_columns_are_those_of_its_data_where_others_have_them(asked, run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    values = yaml.safe_load((run / "config.yaml").read_text())
    (copy / "config.yaml").write_text(yaml.safe_dump(values | {"columns": "prompt=ask,completion=say,input="}))
    data, answered = tmp_path / "mine.jsonl", {"question": "answer", "ask": "say", "prompt": "completion"}[asked]
    rows = [{asked: f"{n}?", answered: "yes", "input": "ignored"} for n in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = load_tokenizer(find_adapter(copy))
    texts = [tokenizer.decode(ids) for part in split(copy, [str(data)]) for ids in part.records["input_ids"]]
    assert len(texts) == 4 and not any("ignored" in text for text in texts)


def test_a_kept_tokenizer_stands_in_for_the_file_of_the_run_s_template(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    values = yaml.safe_load((run / "config.yaml").read_text())
    (copy / "config.yaml").write_text(yaml.safe_dump(values | {"prompt_template": str(tmp_path / "gone.jinja")}))
    with pytest.raises(UserError, match=r"gone.jinja: No such file"):
        split(copy)
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ '[assistant]' if add_generation_prompt }}"
    )
    write_tokenizer_files(tokenizer_files(tiny_tokenizer(), template), copy / "adapter")
    texts = [tiny_tokenizer().decode(ids) for ids in split(copy)[0].records["input_ids"]]
    assert all(text.startswith("[user]") and "[assistant]" in text for text in texts)


def test_a_run_without_validation_says_what_calibration_needs(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    values = yaml.safe_load((run / "config.yaml").read_text())
    changed = values | {"eval_dataset": None, "validation_split_percentage": 0.0}
    (copy / "config.yaml").write_text(yaml.safe_dump(changed))
    with pytest.raises(UserError) as error:
        split(copy)
    assert str(error.value) == (
        f"the run of {copy / 'adapter'} held out no validation records (--validation_split_percentage 0); give"
        " --calibration DATA"
    )
    assert split(copy, values["eval_dataset"])[0].as_json()["records"] == 6


def test_bad_input(run, tmp_path):
    alone = tmp_path / "alone"
    shutil.copytree(run / "adapter", alone)
    with pytest.raises(UserError) as error:
        split(alone)
    assert str(error.value) == f"{alone} lies in no run folder and has no validation split; give --calibration DATA"
    data = tmp_path / "one.jsonl"
    data.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    with pytest.raises(UserError) as error:
        split(run, [str(data)])
    assert str(error.value) == f"{data} has 1 usable records; calibration and its check need one each"
