"""Finding and reading files, folders and hub names; each bad input gives one line with the place and the remedy."""

import json

import datasets
import pytest

from comol_ds.data.sources import find_sources, read_texts
from tests.data.data_helpers import read, real_data, refused, sums, write_jsonl


def test_jsonl_json_and_parquet_give_the_same_records(tmp_path):
    rows = sums(5)
    write_jsonl(tmp_path / "sums.jsonl", rows)
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "sums.json").write_text(json.dumps(rows))
    (tmp_path / "lines").mkdir()
    write_jsonl(tmp_path / "lines" / "sums.json", rows)
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "sums.parquet"))
    expected = read(tmp_path / "sums.jsonl")
    assert [record["prompt"] for record in expected] == [row["prompt"] for row in rows]
    assert [record["record_id"] for record in expected] == [f"sums:{i}" for i in range(1, 6)]
    for other in ("list/sums.json", "lines/sums.json", "sums.parquet"):
        assert read(tmp_path / other) == expected


def test_rows_keep_line_numbers_types_and_missing_keys(tmp_path):
    path = tmp_path / "dates.jsonl"
    path.write_bytes(
        b'{"prompt": "a", "completion": "2024-05-01"}\n\n{"completion": "2024-05-02", "prompt": "b", "x": 1}\n'
    )
    first, second = read(path)
    assert (first["record_id"], second["record_id"]) == ("dates:1", "dates:3")
    assert second["completion"] == "2024-05-02"


def test_task_column_beats_the_file_name(tmp_path):
    records = read(write_jsonl(tmp_path / "mixed.jsonl", [*sums(1, "adding"), *sums(1)]))
    assert [record["task"] for record in records] == ["adding", "mixed"]


def test_a_split_name_is_no_task_name(tmp_path):
    path = write_jsonl(tmp_path / "gsm" / "train.jsonl", sums(1))
    (record,) = read(path)
    assert (record["task"], record["record_id"]) == ("gsm", "gsm/train:1")


def test_files_of_one_name_stay_apart(tmp_path):
    paths = [write_jsonl(tmp_path / folder / "data.jsonl", sums(1)) for folder in ("a", "b")]
    groups = find_sources(paths, "train", "auto")
    assert [next(read_texts(group))["record_id"] for group in groups] == ["a/data:1", "b/data:1"]


def test_a_folder_gives_the_files_of_its_split(tmp_path):
    for name in ("train-00000.jsonl", "train-00001.jsonl", "test.jsonl", "sub/validation.jsonl"):
        write_jsonl(tmp_path / name, [{"prompt": name, "completion": "x"}])
    assert [r["prompt"] for r in read(tmp_path)] == ["train-00000.jsonl", "train-00001.jsonl"]
    assert [r["prompt"] for r in read(tmp_path, split="validation")] == ["sub/validation.jsonl"]
    (tmp_path / "sub" / "validation.jsonl").unlink()
    assert "no file of split 'validation' (found: test, train); name the file itself" in refused(
        tmp_path, split="validation"
    )


def test_a_folder_without_split_names_is_read_whole(tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        write_jsonl(tmp_path / name, [{"prompt": name, "completion": "x"}])
    assert [r["prompt"] for r in read(tmp_path)] == ["a.jsonl", "b.jsonl"]


def test_missing_file_and_folder(tmp_path):
    assert "no such file or folder; check the path" in refused(tmp_path / "none.jsonl")
    assert "'none.parquet': no such file or folder" in refused("none.parquet")
    assert "no such file or folder" in refused("./none")
    assert "holds no .json, .jsonl, .parquet file" in refused(tmp_path)


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_jsonl(tmp_path / "x.jsonl", sums(2))
    assert len(read("~/x.jsonl")) == 2
    assert "'~/none': no such file or folder" in refused("~/none")


def test_unknown_suffix(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("a,b")
    assert "unknown kind of file; accepted: .json, .jsonl, .parquet" in refused(path)


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.json", "empty.parquet"])
def test_empty_file(tmp_path, name):
    (tmp_path / name).touch()
    assert f"{name}' is empty" in refused(tmp_path / name)


@pytest.mark.parametrize(("name", "content"), [("blank.jsonl", "\n\n"), ("blank.json", "[]")])
def test_file_without_records(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert f"{name}' holds no records" in refused(tmp_path / name)


def test_broken_line_is_named(tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n\n{"prompt": "a", "comp\n')
    message = refused(path)
    assert "broken.jsonl line 3: broken JSON (" in message
    assert 'in \'{"prompt": "a", "comp\'' in message


def test_broken_json_list_and_bytes(tmp_path):
    (tmp_path / "list.json").write_text('[\n{"prompt": "a"},\n{"prompt" "b"}]')
    assert "list.json line 3: broken JSON (" in refused(tmp_path / "list.json")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "a", "completion": "\xe9t\xe9"}\n')
    assert "latin.jsonl line 1: broken JSON (not UTF-8 text)" in refused(tmp_path / "latin.jsonl")
    for name in ("half.jsonl", "half.json"):  # a surrogate as three bytes, which Python's json decodes
        row = b'{"prompt": "a", "completion": "\xed\xa0\x80"}'
        (tmp_path / name).write_bytes(row if name == "half.jsonl" else b"[" + row + b"]")
        assert "not UTF-8 text" in refused(tmp_path / name)
    (tmp_path / "fake.parquet").write_bytes(b"no parquet at all")
    assert "not a readable Parquet file" in refused(tmp_path / "fake.parquet")


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_rows_that_no_reader_takes(tmp_path, name):
    rows = ['{"prompt": "a", "completion": "b"}', '{"prompt": "a", "completion": "b", "meta": "\\ud83d"}']

    def message(*changed: str) -> str:
        text = "\n".join([*rows[:1], *changed])
        (tmp_path / name).write_text(text if name.endswith("l") else f"[{','.join([*rows[:1], *changed])}]")
        return refused(tmp_path / name)

    second = f"{name} {'line' if name.endswith('l') else 'row'} 2"
    assert f"{second}: \\ud83d is half of a surrogate pair, which is no character; repair" in message(rows[1])
    assert f"{second}: \\udc00 is half" in message('{"prompt": "a", "completion": ["\\uDC00"]}')
    assert "broken JSON (it is nested too deeply)" in message('{"prompt": ' + "[" * 5000)
    assert "broken JSON (Exceeds the limit (4300" in message(
        '{"prompt": "a", "completion": "b", "n": 1' + "0" * 5000 + "}"
    )


def test_a_whole_surrogate_pair_is_a_character(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "\\ud83d\\ude00 \\\\ud83d", "completion": "b"}\n')
    assert [row["prompt"] for row in read_texts(*find_sources([str(path)], "train", "auto"))] == ["\U0001f600 \\ud83d"]


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.parquet"])
def test_a_record_longer_than_any_context(tmp_path, monkeypatch, name):
    monkeypatch.setattr("comol_ds.data.rows._LONGEST_RECORD", 100)
    rows = [*sums(1), {"prompt": "a" * 101, "completion": "b"}]
    write = {"x.jsonl": write_jsonl, "x.json": lambda path, rows: path.write_text(json.dumps(rows))}
    write.get(name, lambda path, rows: datasets.Dataset.from_list(rows).to_parquet(path))(tmp_path / name, rows)
    where = f"{name} {'line' if name == 'x.jsonl' else 'row'} 2"
    assert f"{where}: it is longer than 64 MiB, which no model reads at once; split it" in refused(tmp_path / name)


def test_unreadable_file(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "x.jsonl", sums(1))

    def forbidden(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", forbidden)
    assert "x.jsonl: cannot be read (Permission denied); check the file" in refused(path)


def test_rows_that_are_no_objects(tmp_path):
    (tmp_path / "numbers.jsonl").write_text("1\n2\n")
    assert "numbers.jsonl row 1: int, expected a JSON object per record" in refused(tmp_path / "numbers.jsonl")


def test_wrong_type_names_file_and_row(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [*sums(2), {"prompt": "a", "completion": 3}])
    assert "x.jsonl row 3: column 'completion' is int (3), expected text" in refused(path)
    path = write_jsonl(tmp_path / "y.jsonl", [{"prompt": "a", "completion": "b", "task": 3}])
    assert "y.jsonl row 1: column 'task' is int, expected text" in refused(path)


def test_real_folder_never_gives_its_test_file():
    folder = real_data("gsm8k/train.jsonl").parent
    (group,) = find_sources([str(folder)], "train", "auto")
    assert [source.path for source in group] == [str(folder / "train.jsonl")]
    first = next(read_texts(group))
    assert (first["record_id"], first["task"]) == ("gsm8k/train:1", "gsm8k")
    assert "no file of split 'validation' (found: test, train)" in refused(folder, split="validation")


def test_real_files_without_known_columns():
    assert "no known columns (found: ID, Body, Question" in refused(real_data("svamp/SVAMP.json"))
    message = refused(real_data("aqua/dev.jsonl"))
    assert "found: question, options, rationale, correct" in message
    message = refused(real_data("aqua/dev.jsonl"), data_format="question_answer")
    assert "question_answer needs the column 'answer'" in message


def test_hub_name_that_cannot_be_resolved(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'nobody/nothing'\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = refused("nobody/nothing")
    assert "'nobody/nothing': neither a file here nor loadable from the hub, split 'train'" in message
    assert "(Couldn't reach 'nobody/nothing' on the Hub); check the name" in message


def test_hub_data_set_with_config(monkeypatch):
    asked = []

    def load(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        return datasets.Dataset.from_list([{"question": "Why?", "answer": "So."}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    (record,) = read("openai/gsm8k:main")
    assert set(asked) == {("openai/gsm8k", "main", "train", False)}
    assert (record["record_id"], record["task"], record["completion"]) == ("gsm8k:1", "gsm8k", "So.")
