"""Settings to training and validation records: splits, mixtures, limits, counts, the cache and its keys."""

import os
from collections import Counter
from itertools import islice
from pathlib import Path

import datasets
import pytest

from comol_ds.data import token_cache
from comol_ds.data.prepare import prepare_data
from comol_ds.errors import UserError
from tests.data.data_helpers import real_data, settings, sums, tiny_tokenizer, write_jsonl


def prepare(*data_sets, tokenizer=None, seed=1, **changes):
    return prepare_data(settings(*data_sets, **changes), tokenizer or tiny_tokenizer(chat=False), seed)


def refused(*data_sets, **changes) -> str:
    with pytest.raises(UserError) as error:
        prepare(*data_sets, **changes)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def two_sets(tmp_path):
    return write_jsonl(tmp_path / "small.jsonl", sums(40)), write_jsonl(tmp_path / "large.jsonl", sums(160))


def test_real_gsm8k_is_read_whole_with_exact_counts():
    path = real_data("gsm8k/train.jsonl")
    data = prepare(str(path), max_length=512)
    report = data.report
    with open(path, "rb") as lines:
        assert report.read == sum(1 for _ in lines) == 7473
    assert report.train + report.validation + report.dropped == 7473
    assert report.train == len(data.train)
    assert report.validation == len(data.validation) == round(0.05 * (7473 - report.dropped))
    ids = set(data.train["record_id"][:])
    assert len(ids) == len(data.train) and not ids & set(data.validation["record_id"][:])
    assert data.report.tasks == {"gsm8k": len(data.train)}
    assert report.train_tokens == sum(map(len, data.train["input_ids"]))
    first = data.train[0]
    text = tiny_tokenizer().decode([label for label in first["labels"] if label != -100])
    assert text == first["reference"] + "</s>"
    assert "### Response:\n" in tiny_tokenizer().decode(first["input_ids"][: first["prompt_length"]])


def test_summary_is_one_line_with_the_counts(two_sets):
    summary = prepare(*two_sets).report.summary()
    assert summary.startswith(
        "data: 200 records read, 0 cut at max_length 128, 0 dropped without any label; 190 for tr"
    )
    assert summary.endswith("10 for validation; 2 tasks; prompt template none")
    assert "\n" not in summary


def test_held_out_records_depend_on_the_seed_only(two_sets):
    def held_out(**changes):
        return prepare(*two_sets, **changes).validation["record_id"][:]

    assert held_out() == held_out()
    assert held_out(seed=2) != held_out()
    assert Counter(name.split(":")[0] for name in held_out()) == {"small": 2, "large": 8}
    assert len(held_out(validation_split_percentage=0.001)) == 2  # one of each


def test_eval_dataset_replaces_the_split(two_sets, tmp_path):
    data = prepare(two_sets[0], eval_dataset=[two_sets[1]], max_eval_records=30)
    assert len(data.train) == 40
    assert len(data.validation) == 30 and set(data.validation["task"]) == {"large"}


def test_no_validation_holds_nothing_out(two_sets):
    data = prepare(*two_sets, validation_split_percentage=0)
    assert (len(data.train), len(data.validation), data.report.validation) == (200, 0, 0)
    assert data.validation.features == data.train.features
    streams = prepare(*two_sets, validation_split_percentage=0, streaming=True)
    assert len(streams.validation) == 0 and len(list(streams.train)) == 200


def test_one_record_cannot_be_split(tmp_path):
    message = refused(write_jsonl(tmp_path / "one.jsonl", sums(1)))
    assert "leaves nothing of data set number 1 with 1 usable records; give --eval_dataset or more data" in message


def test_weights_give_exact_shares_repeating_the_small_set(two_sets):
    data = prepare(*two_sets, dataset_weights=[3, 1], eval_dataset=[two_sets[0]])
    assert data.report.tasks == {"large": 50, "small": 150}
    repeats = Counter(data.train["record_id"])
    assert {repeats[f"small:{i}"] for i in range(1, 41)} == {3, 4}
    assert all(count == 1 for name, count in repeats.items() if name.startswith("large"))
    again = prepare(*two_sets, dataset_weights=[3, 1], eval_dataset=[two_sets[0]])
    assert again.train["record_id"][:] == data.train["record_id"][:]


def test_no_weights_is_concatenation(two_sets):
    data = prepare(*two_sets, eval_dataset=[two_sets[0]])
    assert data.train["record_id"][:] == [f"small:{i}" for i in range(1, 41)] + [f"large:{i}" for i in range(1, 161)]


def test_cut_records_are_counted(tmp_path):
    rows = [*sums(18), {"prompt": "How many?", "completion": "one two " * 60}]
    data = prepare(write_jsonl(tmp_path / "x.jsonl", rows))
    assert (data.report.truncated, data.report.dropped) == (1, 0)


def test_too_many_dropped_shows_one(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [*sums(18), {"prompt": "one two\n " * 60, "completion": "x"}, *sums(1)])
    message = refused(path, max_dropped_fraction=0.04)
    assert "1 of 20 records have no label, more than max_dropped_fraction 0.04; for example x:19" in message
    assert "tokens fills max_length 128: '<s>one two one two" in message
    data = prepare(path, max_dropped_fraction=0.05)
    assert data.report.dropped == 1
    assert "x:19" not in [*data.train["record_id"], *data.validation["record_id"]]


def test_too_many_empty_answers(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [*sums(3), {"prompt": "How many?", "completion": None}])
    assert "for example x:4, where its answer is empty: '<s>How many?'" in refused(path)


def test_an_answer_that_nobody_asks_for_is_not_called_empty(tmp_path):
    turns = [{"role": "assistant", "content": "Two."}]
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": turns}])
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0].role }}" + tokenizer.chat_template
    with pytest.raises(UserError, match=r"nobody asks for its only answer \(such records belong in the format text\)"):
        prepare_data(settings(path), tokenizer, seed=42)


def test_all_prompts_too_long_names_the_shortest(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", sums(20))
    tokenizer = tiny_tokenizer()
    shortest = min(1 + len(tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]) for row in sums(20))
    message = refused(path, max_length=8)
    assert f"every prompt is longer than max_length 8 leaves room for (the shortest has {shortest} tokens)" in message
    assert "raise --max_length" in message


def test_errors_inside_datasets_come_out_as_they_are(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' * 3 + "broken\n")
    assert "x.jsonl line 4: broken JSON" in refused(str(path))
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": "a"}]}])
    assert "chat.jsonl' is in the messages format, but the tokenizer of 'tiny' has no chat template" in refused(path)
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 3
    bad = tiny_tokenizer()
    bad.chat_template = "{{ raise_exception('no') }}"
    for workers in (None, 2):
        message = refused(write_jsonl(tmp_path / "c.jsonl", rows), tokenizer=bad, preprocessing_num_workers=workers)
        assert "c:1: the chat template of 'tiny' refuses this record (no)" in message


@pytest.fixture
def builds(monkeypatch):
    """Counts how often something was tokenized instead of found."""
    built = []
    real = token_cache._build
    monkeypatch.setattr(token_cache, "_build", lambda *args: (built.append(args), real(*args))[1])
    return built


def test_cache_is_hit_by_the_same_and_missed_by_anything_else(two_sets, builds):
    first = prepare(two_sets[0])
    again = prepare(two_sets[0])
    assert len(builds) == 1
    assert again.train.to_dict() == first.train.to_dict() and again.report == first.report
    prepare(two_sets[0], seed=7, max_train_records=3, validation_split_percentage=50.0)
    prepare(two_sets[0], preprocessing_num_workers=2)
    assert len(builds) == 1  # neither changes a token
    prepare(two_sets[0], max_length=64)
    prepare(two_sets[0], train_on_prompt=True)
    prepare(two_sets[0], tokenizer=tiny_tokenizer(chat=False, adds=""))
    assert len(builds) == 4


def test_more_workers_give_the_same_tokens(two_sets, builds, tmp_path, monkeypatch):
    alone = prepare(*two_sets)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "another_cache")
    shared = prepare(*two_sets, preprocessing_num_workers=2)
    assert shared.train.to_dict() == alone.train.to_dict()
    assert shared.report.stamps == alone.report.stamps
    assert len(builds) == 4


def test_cache_notices_a_changed_file(two_sets, builds):
    prepare(two_sets[0])
    write_jsonl(Path(two_sets[0]), sums(41))
    assert prepare(two_sets[0]).report.read == 41
    assert len(builds) == 2


def test_stamps_change_with_what_is_trained_and_with_nothing_else(two_sets, tmp_path):
    """Neither with the time of the file, nor with rows that are written in another way."""
    small, name = Path(two_sets[0]), f"dataset {two_sets[0]!r}"
    first = prepare(two_sets[0], eval_dataset=[two_sets[1]]).report.stamps
    assert first.keys() == {name, f"eval_dataset {two_sets[1]!r}"}
    assert first[name].startswith("40 records, ")
    small.write_text(small.read_text().replace('": "', '":  "'))
    assert prepare(two_sets[0], eval_dataset=[two_sets[1]]).report.stamps == first
    swapped = sums(40)
    swapped[3], swapped[4] = swapped[4], swapped[3]
    write_jsonl(small, swapped)
    second = prepare(two_sets[0], eval_dataset=[two_sets[1]]).report.stamps
    assert second[name] != first[name]
    assert {**second, name: first[name]} == first
    assert prepare(two_sets[0], train_on_prompt=True).report.stamps[name] != second[name]


def test_stamps_of_streams_are_their_first_records_and_the_files_size(two_sets, tmp_path):
    options = {"streaming": True, "eval_dataset": [two_sets[1]]}
    first = prepare(two_sets[0], **options).report.stamps
    size = Path(two_sets[0]).stat().st_size
    assert first[f"dataset {two_sets[0]!r}"].startswith(f"{size} bytes, first 40 records, ")
    assert prepare(two_sets[0], **options).report.stamps == first


def test_overwrite_cache_replaces_results_from_before_the_run_once(two_sets, builds, monkeypatch):
    prepare(two_sets[0])
    prepare(two_sets[0], overwrite_cache=True)
    assert len(builds) == 1  # what this run, or another rank of it, has just made
    (folder,) = (path for path in (datasets.config.HF_DATASETS_CACHE / "comol_ds").iterdir() if path.is_dir())
    os.utime(folder, (0, 0))
    prepare(two_sets[0], overwrite_cache=True)
    prepare(two_sets[0], overwrite_cache=True)
    assert len(builds) == 2
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, f"{folder.name}.lock"}


def test_damaged_tokens_are_not_trained_but_built_again(two_sets, builds, capsys):
    first = prepare(two_sets[0])
    expected = first.train.to_dict()
    (tokens,) = (datasets.config.HF_DATASETS_CACHE / "comol_ds").glob("*/*.arrow")
    with tokens.open("r+b") as file:
        file.seek(tokens.stat().st_size // 2)
        file.write(bytes(200))
    again = prepare(two_sets[0])
    assert again.train.to_dict() == expected and again.report == first.report
    assert len(builds) == 2
    assert f"(the content of {tokens.name} has changed) and is built again\n" in capsys.readouterr().out


def test_unwritable_cache_is_a_user_error(two_sets, tmp_path, monkeypatch):
    (tmp_path / "occupied").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "occupied")
    assert "set HF_DATASETS_CACHE to a folder with space" in refused(two_sets[0])


def test_a_stream_gives_the_same_tokens_as_the_whole(two_sets):
    whole = prepare(two_sets[0], eval_dataset=[two_sets[1]])
    stream = prepare(two_sets[0], eval_dataset=[two_sets[1]], streaming=True)
    assert list(stream.train) == whole.train.to_list()
    assert stream.validation.to_list() == whole.validation.to_list()
    assert stream.report.summary().startswith("data: first 40 records of the stream, 0 cut")


def test_streams_are_mixed_by_weight(two_sets):
    options = {"streaming": True, "eval_dataset": [two_sets[0]], "dataset_weights": [1, 3]}
    tasks = Counter(record["task"] for record in islice(prepare(*two_sets, **options).train, 120))
    assert 75 <= tasks["large"] <= 105


def test_stream_is_checked_before_the_run(tmp_path, two_sets):
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "a", "completion": ""}, *sums(9)])
    message = refused(path, streaming=True, eval_dataset=[two_sets[0]])
    assert "1 of 10 records have no label" in message
    broken = tmp_path / "y.jsonl"
    broken.write_text('{"prompt": "a", "completion": "b"}\nbroken\n')
    assert "y.jsonl line 2: broken JSON" in refused(str(broken), streaming=True, eval_dataset=[two_sets[0]])
