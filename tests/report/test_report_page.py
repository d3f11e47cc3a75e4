"""launch/router_report.py: the files it writes, what the page says, and what it refuses."""

import base64
import importlib.util
import re
from pathlib import Path

import pytest

from comol_ds.report import sections, style
from tests.report.synthetic import layer_names, training, write_lines

REPOSITORY = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("launch_router_report", REPOSITORY / "launch" / "router_report.py")
launcher = importlib.util.module_from_spec(spec)
spec.loader.exec_module(launcher)

TASKS = ("arithmetic", "sort", "reverse")
PICTURES = {"mean_gate", "mean_gate_training", "tasks", "task_information", "depth", "training"}
COMPARED = {"compare_mean_gate", "compare_entropy_depth", "compare_entropy_training", "compare_task_information"}


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """Pictures of a fifth of the pixels along each side: most of the time goes into them."""
    monkeypatch.setattr(style, "DPI", 30)


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are made and not drawn, for tests of what the page says."""
    numbers = iter(range(100))
    monkeypatch.setattr(sections, "png", lambda figure: b"picture %d" % next(numbers))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("runs") / "first", training(layer_names(3, 2), 4, TASKS))


@pytest.fixture
def page(capsys, tmp_path):
    """Writes a report into a new folder; returns its page and the names of its pictures."""

    def write(*runs) -> tuple[str, set[str]]:
        folder = tmp_path / "report"
        assert launcher.main([*map(str, runs), "--output_dir", str(folder)]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == f"{folder}/report.html"
        html = (folder / "report.html").read_text()
        embedded = re.findall(r'<img [^>]*src="([^"]*)"', html)
        files = sorted(folder.glob("*.png"))
        assert sorted(embedded) == sorted(
            f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}" for file in files
        )
        assert not re.search(r"https?:|//[a-z]|<link|<iframe|@import|url\(", re.sub(r'src="data:[^"]*"', "", html))
        return re.sub(r'src="data:[^"]*"', "", html), {file.stem for file in files}

    return write


def test_the_page_holds_every_picture_and_every_layer(page, run):
    html, pictures = page(run)
    assert pictures == PICTURES
    assert all(f'<td class="text">{name}</td>' in html for name in layer_names(3, 2))
    links = re.findall(r'<a href="#(\w+)"', html)
    assert len(links) == 7 and all(f'<h2 id="{link}"' in html for link in links)


def test_quantities_are_explained(page, run, undrawn):
    html, _ = page(run)
    explained = re.findall("<dt>(.*?)</dt>", html)
    assert {"mean gate", "effective experts", "I(task; expert)", "mean cosine of cores", "dead experts"} <= {*explained}


def test_the_default_folder_is_in_the_run(tmp_path, undrawn):
    folder = write_lines(tmp_path / "run", training(layer_names(1, 1), 2, steps=(1,), evaluations=()))
    assert launcher.main([str(folder / "router_load.jsonl")]) == 0
    assert (folder / "router_report" / "report.html").is_file()


def test_one_layer_and_one_line_without_tasks(page, tmp_path):
    folder = write_lines(tmp_path / "run", training(layer_names(1, 1), 2, steps=(0,), evaluations=()))
    html, pictures = page(folder)
    assert pictures == {"mean_gate", "training"}
    assert "Only one line was logged" in html and "No tasks:" in html


def test_one_task_has_nothing_to_be_told_apart_from(page, tmp_path, undrawn):
    html, pictures = page(write_lines(tmp_path / "run", training(layer_names(2, 1), 3, ("only",))))
    assert pictures == PICTURES - {"tasks", "task_information"}
    assert "Nothing to tell apart: 3 experts, tasks only." in html


def test_one_expert(page, tmp_path):
    html, _ = page(write_lines(tmp_path / "run", training(layer_names(2, 1), 1, TASKS)))
    assert "Nothing to tell apart: 1 experts" in html


def test_names_without_an_index(page, tmp_path):
    html, pictures = page(write_lines(tmp_path / "run", training(["lm_head", "score"], 3, TASKS)))
    assert pictures == PICTURES - {"depth"}
    assert "Layers without an index" in html


def test_collapsed_layers_and_dead_experts_are_listed(page, tmp_path, undrawn):
    lines = training(layer_names(2, 1), 3, steps=(0, 5), evaluations=())
    q0, q1 = layer_names(2, 1)
    lines[-1]["layers"][q0] |= {"mean_gate": [0.02, 0.95, 0.03], "dead_experts": []}
    lines[-1]["layers"][q1] |= {"mean_gate": [0.001, 0.599, 0.4], "dead_experts": [0]}
    html, _ = page(write_lines(tmp_path / "run", lines))
    assert "Collapsed layers: 1" in html and "Layers with dead experts: 1, 1 experts in all" in html
    assert f'<td class="text">{q0}</td><td data-v="1">1</td><td>0.950</td>' in html


def test_nothing_wrong_is_said_so(page, tmp_path, undrawn):
    lines = training(layer_names(2, 1), 3, steps=(0,), evaluations=())
    for layer in lines[-1]["layers"].values():
        layer |= {"mean_gate": [0.3, 0.3, 0.4], "dead_experts": []}
    html, _ = page(write_lines(tmp_path / "run", lines))
    assert "no dead expert, no collapsed layer" in html


def test_gates_that_are_not_finite_are_drawn_gray_and_said(page, tmp_path):
    lines = training(layer_names(2, 1), 3, TASKS)
    for line in lines:
        for layer in line["layers"].values():
            layer["mean_gate"] = [float("nan")] * 3
            for task in layer["tasks"].values():
                task["mean_gate"] = [float("nan")] * 3
    html, pictures = page(write_lines(tmp_path / "run", lines))
    assert "some mean gates are not finite" in html and pictures == PICTURES


def test_names_are_escaped(page, tmp_path):
    html, _ = page(write_lines(tmp_path / "<run>", training(layer_names(1, 1), 2, ("<b>bold</b>", r"$\no_formula$"))))
    assert "<b>" not in html and "&lt;b&gt;bold" in html and "&lt;run&gt;" in html


def test_a_half_written_line_is_noted_on_the_page_and_on_the_console(capsys, tmp_path, undrawn):
    file = write_lines(tmp_path / "run", training(layer_names(1, 1), 2)) / "router_load.jsonl"
    file.write_text(file.read_text()[:-50])
    assert launcher.main([str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.startswith("note: line 6, the last of ")
    assert "is half written and was ignored" in (tmp_path / "run" / "router_report" / "report.html").read_text()


@pytest.mark.slow
def test_two_runs_are_compared(page, run, tmp_path):
    second = write_lines(tmp_path / "second", training(layer_names(3, 2), 4, TASKS, seed=1))
    html, pictures = page(run, second)
    assert pictures == PICTURES | {f"second_{name}" for name in PICTURES} | COMPARED
    assert "Mean gate of second (step 40) minus that of first (step 40)" in html


def test_the_change_of_mean_gate_is_second_minus_first(page, tmp_path, undrawn):
    lines = training(layer_names(1, 1), 4, steps=(0,), evaluations=())
    [name] = layer_names(1, 1)
    folders = []
    for folder, gate in (("a", [0.5, 0.2, 0.2, 0.1]), ("b", [0.25, 0.25, 0.25, 0.25])):
        lines[0]["layers"][name]["mean_gate"] = gate
        folders.append(write_lines(tmp_path / folder, lines))
    html, _ = page(*folders)
    assert "the mean over all is 0.250" in html  # 0.25 leave the first expert
    assert f'<td class="text">{name}</td><td>0.250</td>' in html


def test_runs_with_some_layers_in_common(page, run, tmp_path, undrawn):
    second = write_lines(tmp_path / "second", training(layer_names(5, 3), 4))
    html, pictures = page(run, second)
    assert "Compared are the 6 layers that both runs have." in html
    assert {name for name in pictures if "compare" in name} == COMPARED - {"compare_task_information"}


def test_runs_without_a_common_layer_are_both_reported(page, run, tmp_path, undrawn):
    html, pictures = page(run, write_lines(tmp_path / "second", training(["lm_head"], 4, TASKS)))
    assert "The runs have no layer in common" in html
    assert {"mean_gate", "second_mean_gate"} <= pictures and not any("compare" in name for name in pictures)


def test_runs_with_different_numbers_of_experts(page, run, tmp_path, undrawn):
    html, pictures = page(run, write_lines(tmp_path / "second", training(layer_names(3, 2), 6, TASKS)))
    assert "first has 4 experts and second 6, so mean gates are not subtracted." in html
    assert {name for name in pictures if "compare" in name} == COMPARED - {"compare_mean_gate"}


def test_runs_of_the_same_name_are_told_apart_by_their_paths(page, run, tmp_path, undrawn):
    second = write_lines(tmp_path / "first", training(layer_names(3, 2), 4, TASKS))
    html, _ = page(run, second)
    assert f"<h3>{run}/router_load.jsonl</h3>" in html and f"<h3>{second}/router_load.jsonl</h3>" in html


def test_more_kinds_of_module_than_are_drawn(page, tmp_path, undrawn):
    names = [f"model.layers.{i}.mlp.kind{kind}" for i in range(2) for kind in range(14)]
    html, _ = page(write_lines(tmp_path / "run", training(names, 2, steps=(0, 1), evaluations=())))
    assert "run adapts 14 kinds of module; pictures show the first 12" in html
    assert "model.layers.1.mlp.kind13" in html


REFUSED = {
    "no run": ([], "the following arguments are required: RUN; see --help"),
    "unknown flag": (["{run}", "--out", "x"], "unrecognized arguments: --out x; see --help"),
    "no such run": (
        ["{run}", "/no/run"],
        "/no/run: no such file or folder; give a run's --output_dir or its router_load.jsonl",
    ),
    "a file as folder": (
        ["{run}", "--output_dir", "{run}/router_load.jsonl"],
        "--output_dir {run}/router_load.jsonl: File exists; choose another folder",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_on_one_line(case, run, capsys):
    words, message = REFUSED[case]
    assert launcher.main([word.format(run=run) for word in words]) == 2
    assert capsys.readouterr().err == f"router_report.py: error: {message.format(run=run)}\n"
