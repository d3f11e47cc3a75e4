"""Folders with more than data in them, folders of save_to_disk, columns by other names, nulls that Arrow adds."""

import datasets
import pytest

from comol_ds.data.sources import find_sources
from comol_ds.output_folder import EXPORT_MARK, RUN_MARK, write_mark
from tests.data import chat_templates as templates
from tests.data.chat_templates import chat_tokenizer
from tests.data.data_helpers import read, refused, sums, write_jsonl
from tests.data.test_prepared_prompts import first_texts, prepare


def test_hidden_files_are_no_data(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", sums(2))
    for name in (".ipynb_checkpoints/a-checkpoint.jsonl", "._a.jsonl", "__MACOSX/a.jsonl", "sub/.cache/b.json"):
        write_jsonl(tmp_path / name, [{"other": 1}])
    assert [record["record_id"] for record in read(tmp_path)] == ["a:1", "a:2"]
    (tmp_path / "a.jsonl").unlink()
    assert "holds no .json, .jsonl, .parquet file" in refused(tmp_path)
    hidden = tmp_path / ".data" / "b.jsonl"
    write_jsonl(hidden, sums(1))
    assert len(read(hidden)) == len(read(hidden.parent)) == 1, "what the user names is read"


@pytest.mark.parametrize("mark", [RUN_MARK, EXPORT_MARK])
def test_what_runs_and_exports_wrote_is_no_data(tmp_path, mark):
    write_jsonl(tmp_path / "a.jsonl", sums(2))
    out = tmp_path / "runs" / "out"
    write_jsonl(out / "logs" / "metrics.jsonl", [{"prompt": "step", "completion": "7"}])
    write_mark(out, mark)
    assert [record["record_id"] for record in read(tmp_path)] == ["a:1", "a:2"]
    assert len(read(out)) == 1, "what the user names is read"


def test_a_folder_of_save_to_disk_is_read(tmp_path):
    rows = sums(5)
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"), num_shards=2)
    records = read(tmp_path / "saved")
    assert [(record["prompt"], record["completion"]) for record in records] == [tuple(row.values()) for row in rows]
    assert [record["record_id"] for record in records] == [f"saved:{number}" for number in range(1, 6)]
    stamps = [find_sources([str(tmp_path / "saved")], "train", "auto")[0][0].stamp for _ in range(2)]
    datasets.Dataset.from_list(rows[1:]).save_to_disk(str(tmp_path / "other"))
    assert stamps[0] == stamps[1]
    (tmp_path / "saved" / "data-00000-of-00002.arrow").write_bytes(b"")
    assert "saved: not a readable folder of Dataset.save_to_disk (" in refused(tmp_path / "saved")


def test_a_saved_dictionary_is_read_at_its_split(tmp_path):
    whole = {name: datasets.Dataset.from_list(sums(size)) for name, size in (("train", 3), ("dev", 2), ("de", 1))}
    datasets.DatasetDict(whole).save_to_disk(str(tmp_path / "saved"))
    for split, size in (("train", 3), ("validation", 2), ("dev", 2), ("de", 1)):
        assert len(read(tmp_path / "saved", split=split)) == size
    assert read(tmp_path / "saved")[0]["task"] == "saved"
    assert "saved': no split 'test' (found: train, dev, de); name the split's folder" in refused(
        tmp_path / "saved", split="test"
    )
    (tmp_path / "saved" / "dataset_dict.json").write_text("[]")
    assert "its dataset_dict.json is not what save_to_disk writes" in refused(tmp_path / "saved")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_columns_by_other_names(tmp_path, suffix):
    row = {"Question": "Why?", "reply": "So.", "prompt": "unused", "system": "Be long."}
    path = tmp_path / f"x{suffix}"
    datasets.Dataset.from_list([row]).to_parquet(str(path)) if suffix == ".parquet" else write_jsonl(path, [row])
    (record,) = read(path, columns="prompt=Question, completion=reply,system=")
    assert (record["prompt"], record["completion"]) == ("Why?", "So.")
    assert "column 'system' would be lost" in refused(path, columns="prompt=Question,completion=reply")
    message = refused(path, columns="prompt=question,completion=reply")
    assert message.endswith(
        "--columns names the column 'question' (found: Question, reply, prompt, system); correct it"
    )
    for wrong in ("Question", "ask=Question", "prompt:Question"):
        assert f"--columns {wrong}: expected NAME=COLUMN,NAME=COLUMN where NAME is one of messages, " in refused(
            path, columns=wrong
        )


def test_columns_and_formats_are_settings_of_a_run(tmp_path):
    rows = [{"q": f"How many is {number}?", "a": f"{number}", "tools": "[]", "source": "me"} for number in range(3)]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    tokenizer = chat_tokenizer(templates.CHATML)
    data = prepare(path, tokenizer, columns="question=q,answer=a")
    assert first_texts(data, tokenizer)[1] == "0<|im_end|>"
    assert "dropped without any label; columns not used: source; 3 for training" in data.report.summary()


def test_a_plain_text_is_learned_whole_and_asks_nothing(tmp_path):
    tokenizer = chat_tokenizer(templates.CHATML)
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": f"There are {number}."} for number in range(3)])
    data = prepare(path, tokenizer)
    assert first_texts(data, tokenizer) == ("", "There are 0.<|im_end|>")
    assert data.train[0]["trained_tokens"] == data.train[0]["length"] - 1
    assert data.train["prompt_length"][:] == [0, 0, 0], "nothing is generated for them"


def test_nulls_that_parquet_adds_vanish_at_every_depth(tmp_path):
    def call(name, **arguments):
        return [{"type": "function", "function": {"name": name, "arguments": arguments}}]

    def tools(**properties):
        return [{"type": "function", "function": {"name": "add", "parameters": {"properties": properties}}}]

    ask = {"role": "user", "content": "How many?"}
    rows = [
        {
            "messages": [ask, {"role": "assistant", "tool_calls": call("add", a=1)}],
            "tools": tools(a={"type": "integer"}),
        },
        {"messages": [ask, {"role": "assistant", "tool_calls": call("add", b="2")}], "tools": tools(b={"enum": ["2"]})},
        {"messages": [ask, {"role": "assistant", "content": "Two.", "name": "me"}], "tools": []},
    ]
    path = str(tmp_path / "x.parquet")
    datasets.Dataset.from_list(rows).to_parquet(path)
    datasets.load_dataset("parquet", data_files=path, split="train", cache_dir=str(tmp_path / "hub")).save_to_disk(
        str(tmp_path / "saved")
    )
    lines = write_jsonl(tmp_path / "x.jsonl", rows)
    tokenizer = chat_tokenizer(templates.TOOLS)
    expected = prepare(lines, tokenizer).train["input_ids"][:]
    assert "null" not in tokenizer.decode(expected[0]) and '"integer"' in tokenizer.decode(expected[0])
    for other in (path, str(tmp_path / "saved")):
        found = prepare(other, tokenizer).train["input_ids"][:]
        assert [_as_sets(ids, tokenizer) for ids in found] == [_as_sets(ids, tokenizer) for ids in expected]


def _as_sets(ids, tokenizer) -> list[str]:
    """The text without the order of keys, which Arrow has one of for all rows."""
    return sorted(tokenizer.decode(ids).replace("}", ",").replace("{", ",").split(","))


def test_a_null_that_json_says_is_kept_in_arguments(tmp_path):
    call = {"name": "add", "arguments": {"a": None}}
    turns = [{"role": "user", "content": "How many?"}, {"role": "assistant", "tool_calls": [call], "content": None}]
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": turns}])
    tokenizer = chat_tokenizer(templates.CHATML)
    assert first_texts(prepare(path, tokenizer), tokenizer)[1] == '<tool_call>add {"a": null}</tool_call><|im_end|>'
