"""Reading router_load.jsonl: what is kept, and what is refused on one line."""

import json
import math
import os

import numpy as np
import pytest

from comol_ds.errors import UserError
from comol_ds.report.read import read_run
from tests.report.synthetic import layer_names, training, write_lines

NAMES = layer_names(2, 2)
Q0 = NAMES[0]
OTHER = "the file was written by another version of comol_ds, use the one that trained"


@pytest.fixture
def lines():
    return training(NAMES, 3, tasks=("sums", "words"), steps=(0, 10, 20), evaluations=(0, 20))


def test_records_of_both_splits_are_kept_apart(lines, tmp_path):
    run = read_run(write_lines(tmp_path / "run", lines))
    assert [record.step for record in run.records["train"]] == [0, 10, 20]
    assert [record.step for record in run.records["validation"]] == [0, 20]
    assert run.layers == tuple(NAMES)
    assert run.num_experts == 3
    assert run.last.step == 20 and run.last.split == "train"
    last = next(line for line in reversed(lines) if line["split"] == "train")["layers"]
    for row, name in enumerate(NAMES):
        for key in ("mean_gate", "argmax_share", "share_above_half"):
            assert run.last.experts[key][row].tolist() == last[name][key]
        for key in ("entropy", "effective_experts", "cv", "max_min_ratio", "update_ratio", "core_cosine"):
            assert run.last.scalars[key][row] == last[name][key]
        assert list(run.last.dead[row]) == last[name]["dead_experts"]


def test_tasks_come_from_the_last_validation(lines, tmp_path):
    record = read_run(write_lines(tmp_path / "run", lines)).with_tasks
    assert (record.split, record.step, record.tasks.names) == ("validation", 20, ("sums", "words"))
    assert record.tasks.tokens.tolist() == [400, 500]
    line = next(line for line in reversed(lines) if line["split"] == "validation")
    assert record.tasks.mean_gate[1, 2].tolist() == line["layers"][NAMES[2]]["tasks"]["words"]["mean_gate"]


def test_tasks_come_from_training_when_validation_has_none(lines, tmp_path):
    for line in lines:
        if line["split"] == "validation":
            for layer in line["layers"].values():
                layer["tasks"] = {}
    assert read_run(write_lines(tmp_path / "run", lines)).with_tasks.split == "train"


def test_information_of_every_line_stays_though_tasks_do_not(lines, tmp_path):
    train = read_run(write_lines(tmp_path / "run", lines)).records["train"]
    assert [record.tasks is None for record in train] == [True, True, False]
    assert [record.information.shape for record in train] == [(4,)] * 3


@pytest.mark.parametrize("remove", [{}, None])
def test_a_run_without_tasks(remove, lines, tmp_path):
    for line in lines:
        line["tokens"] = {"all": 7}
        for layer in line["layers"].values():
            layer["tasks"] = remove
            if remove is None:
                del layer["tasks"]
    assert read_run(write_lines(tmp_path / "run", lines)).with_tasks is None


def test_a_task_without_tokens_is_left_out(lines, tmp_path):
    lines[-1]["tokens"]["sums"] = 0
    assert read_run(write_lines(tmp_path / "run", lines)).with_tasks.tasks.names == ("words",)


def test_a_layer_that_a_task_did_not_reach_has_no_information(lines, tmp_path):
    del lines[-1]["layers"][Q0]["tasks"]["sums"]
    record = read_run(write_lines(tmp_path / "run", lines)).with_tasks
    assert math.isnan(record.information[0]) and np.isfinite(record.information[1:]).all()


def test_null_is_not_a_number(lines, tmp_path):
    lines[-1]["layers"][Q0] |= {"update_ratio": None, "core_cosine": None, "max_min_ratio": None}
    record = read_run(write_lines(tmp_path / "run", lines)).records["validation"][-1]
    assert all(math.isnan(record.scalars[key][0]) for key in ("update_ratio", "core_cosine", "max_min_ratio"))


def test_what_is_not_finite_is_not_a_number(lines, tmp_path):
    """Of a run that diverged."""
    lines[-1]["layers"][Q0] |= {"mean_gate": [INF, NAN, 0.5], "entropy": -INF}
    record = read_run(write_lines(tmp_path / "run", lines)).records["validation"][-1]
    assert np.isnan(record.mean_gate[0]).tolist() == [True, True, False] and math.isnan(record.scalars["entropy"][0])


def test_the_file_itself_can_be_given(lines, tmp_path):
    file = (write_lines(tmp_path / "run", lines) / "router_load.jsonl").rename(tmp_path / "saved.jsonl")
    assert len(read_run(file).records["train"]) == 3


def test_a_half_written_last_line_is_ignored_with_a_note(lines, tmp_path):
    file = write_lines(tmp_path / "run", lines) / "router_load.jsonl"
    file.write_text(file.read_text()[:-100])
    run = read_run(file)
    assert len(run.records["train"]) + len(run.records["validation"]) == len(lines) - 1
    assert run.notes == [f"line 5, the last of {file}, is half written and was ignored"]


def _first_layer(**changes):
    def change(lines):
        lines[1]["layers"][Q0] |= changes

    return change


def _first_task(**changes):
    def change(lines):
        lines[1]["layers"][Q0]["tasks"]["sums"] |= changes

    return change


def _line(**changes):
    return lambda lines: lines[1].update(changes)


def _without(key):
    return lambda lines: lines[1].pop(key)


def _more_experts(lines):
    lines[1] = training(NAMES, 4, steps=(0,), evaluations=())[0]


def _other_layers(names):
    def change(lines):
        lines[1]["layers"] = {name: lines[0]["layers"].get(name, lines[0]["layers"][Q0]) for name in names}

    return change


def cut(text):
    """As messages quote a long text."""
    return f"'{text[:47]}...{text[-48:]}'"


NAN, INF = float("nan"), float("inf")
SEPARATE = "report runs of one adapter from separate files"
REFUSED = {
    "version": (_line(version=2), f"has version 2, this program reads version 1; {OTHER}"),
    "no version": (_without("version"), f"has no version, this program reads version 1; {OTHER}"),
    "split": (_line(split="test"), f"split is 'test', neither train nor validation; {OTHER}"),
    "step": (_line(step="4"), f"step is no whole number or tokens has no number for all; {OTHER}"),
    "tokens": (_line(tokens=5120), f"step is no whole number or tokens has no number for all; {OTHER}"),
    "no layers": (_line(layers={}), f"layers is no object of at least one layer; {OTHER}"),
    "layers": (_line(layers={Q0: 3}), f"layers is no object of at least one layer; {OTHER}"),
    "no gates": (_first_layer(mean_gate=None), f"mean_gate of {Q0} is no list of numbers; {OTHER}"),
    "experts differ": (
        _first_layer(mean_gate=[0.5, 0.5]),
        f"{Q0} has 2 experts and {NAMES[1]} has 3; the report needs the same --num_experts",
    ),
    "experts change": (_more_experts, f"4 experts, but 3 in the lines before; {SEPARATE}"),
    "words as gates": (
        _first_layer(mean_gate=[1, "a", 0]),
        f"mean_gate of {Q0} is not a list of 3 numbers, one per expert; {OTHER}",
    ),
    "short share": (
        _first_layer(argmax_share=[0.5, 0.5]),
        f"argmax_share of {Q0} is not a list of 3 numbers, one per expert; {OTHER}",
    ),
    "list as entropy": (_first_layer(entropy=[1.0]), f"entropy of {Q0} is not a number or null; {OTHER}"),
    "dead": (_first_layer(dead_experts=[3]), f"dead_experts of {Q0} is no list of numbers from 0 to 2; {OTHER}"),
    "tasks": (_first_layer(tasks=["sums"]), f"tasks of {Q0} is no object of objects; {OTHER}"),
    "task gates": (
        _first_task(mean_gate=[1.0]),
        f"mean_gate of {Q0}, task sums, is not a list of 3 numbers, one per expert; {OTHER}",
    ),
    "task update": (
        _first_task(update_ratio="x"),
        f"update_ratio of {Q0}, task sums, is not a number or null; {OTHER}",
    ),
    "task count": (_line(tokens={"all": 9, "words": 9}), f"task sums has no number in tokens; {OTHER}"),
    "version is true": (_line(version=True), f"has version True, this program reads version 1; {OTHER}"),
    "huge version": (
        _line(version="x" * 10**5),
        f"has version {cut('x' * 10**5)}, this program reads version 1; {OTHER}",
    ),
    "endless step": (_line(step=10**400), f"step is no whole number or tokens has no number for all; {OTHER}"),
    "negative step": (_line(step=-1), f"step is no whole number or tokens has no number for all; {OTHER}"),
    "NaN tokens": (_line(tokens={"all": NAN}), f"step is no whole number or tokens has no number for all; {OTHER}"),
    "infinite tokens": (
        _line(tokens={"all": INF}),
        f"step is no whole number or tokens has no number for all; {OTHER}",
    ),
    "NaN task": (_line(tokens={"all": 9, "sums": NAN, "words": 9}), f"task sums has no number in tokens; {OTHER}"),
    "endless gate": (
        _first_layer(mean_gate=[10**400, 0, 0]),
        f"mean_gate of {Q0} is not a list of 3 numbers, one per expert; {OTHER}",
    ),
    "digits as text": (
        _first_layer(argmax_share=["1", "0", "0"]),
        f"argmax_share of {Q0} is not a list of 3 numbers, one per expert; {OTHER}",
    ),
    "true as number": (_first_layer(entropy=True), f"entropy of {Q0} is not a number or null; {OTHER}"),
    "absurd ratio": (_first_layer(update_ratio=1e308), f"update_ratio of {Q0} is not a number or null; {OTHER}"),
    "half a letter": (
        _other_layers([*NAMES[:-1], "\ud800"]),
        f"'\\ud800' is no name of a layer or a task; {OTHER}",
    ),
    "endless name": (
        _other_layers([*NAMES, "new\n" * 10**5]),
        f"layer {'new ' * 10**5}"[:300] + f" ...; {SEPARATE}",
    ),
    "new layer": (_other_layers([*NAMES, "new"]), f"layer new is not in the lines before; {SEPARATE}"),
    "lost layer": (_other_layers(NAMES[1:]), f"layer {Q0} of the lines before is missing; {SEPARATE}"),
    "order": (_other_layers(NAMES[::-1]), f"layers are in another order than in the lines before; {SEPARATE}"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_invalid_line_is_refused_with_its_number(case, lines, tmp_path):
    change, message = REFUSED[case]
    change(lines)
    folder = write_lines(tmp_path, lines)
    with pytest.raises(UserError) as error:
        read_run(folder)
    assert str(error.value) == f"{folder}/router_load.jsonl line 2: {message}"


def _whole_file(text):
    def write(folder):
        (folder / "router_load.jsonl").write_text(text)

    return write


def _endless_line(folder):
    file = folder / "router_load.jsonl"
    file.touch()
    os.truncate(file, (128 << 20) + 1)  # of zeros that take no disk


FILE = "{folder}/router_load.jsonl"
NO_LINE = FILE + " has no complete line yet; wait for the run's first --logging_steps, then try again"
REFUSED_FILES = {
    "empty": (_whole_file(""), NO_LINE),
    "half a line": (_whole_file('{"version": 1, "st'), NO_LINE),
    "not JSON": (
        _whole_file("step 1\nstep 2\n"),
        FILE + " line 1: not JSON (Expecting value: line 1 column 1 (char 0)); delete the line and try again",
    ),
    "nested": (
        _whole_file("[" * 10**5 + "\n{}\n"),
        FILE + " line 1: not JSON (it is nested too deeply); delete the line and try again",
    ),
    "another schema": (
        _whole_file('{"step": 1, "loss": 2.0}\n'),
        FILE + f" line 1: has no version, this program reads version 1; {OTHER}",
    ),
    "endless line": (
        _endless_line,
        FILE + f" line 1: longer than 128 MiB; {OTHER}",
    ),
    "no object": (_whole_file("[1]\n"), FILE + " line 1: not an object; give the router_load.jsonl of a run"),
    "no file": (
        lambda folder: None,
        "{folder} has no router_load.jsonl; give a run's --output_dir, one that has logged its first step",
    ),
    "no folder": (
        lambda folder: folder.rmdir(),
        "{folder}: no such file or folder; give a run's --output_dir or its router_load.jsonl",
    ),
}


@pytest.mark.parametrize("case", REFUSED_FILES)
def test_an_unreadable_run_is_refused(case, tmp_path):
    write, message = REFUSED_FILES[case]
    folder = tmp_path / "run"
    folder.mkdir()
    write(folder)
    with pytest.raises(UserError) as error:
        read_run(folder)
    assert str(error.value) == message.format(folder=folder)


def test_a_broken_line_in_the_middle_is_refused(lines, tmp_path):
    file = write_lines(tmp_path / "run", lines) / "router_load.jsonl"
    file.write_text("".join([json.dumps(lines[0]) + "\n", '{"version\n', json.dumps(lines[1]) + "\n"]))
    with pytest.raises(UserError, match=r"line 2: not JSON \(.*\); delete the line and try again$"):
        read_run(file)
