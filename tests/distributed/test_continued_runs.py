"""What a run that continues a checkpoint takes from it, what it changes, says and refuses; one rank, real engines."""

import json
import math

import pytest
import torch
import yaml

from comol_ds.adapters.adapter_folder import read_adapter
from tests.data.data_helpers import sums, write_jsonl
from tests.distributed.continued_worker import MIDDLE, SETTINGS, STEPS
from tests.distributed.launching import REPOSITORY, run_deepspeed
from tests.distributed.one_process import TOLERANCE, relative
from tests.distributed.run_folders import json_lines
from tests.tiny_models import save_tiny_model

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]
RATE = SETTINGS["learning_rate"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, extensions):
    folder = tmp_path_factory.mktemp("continued")
    save_tiny_model(folder / "llama")
    write_jsonl(folder / "data.jsonl", sums(40))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        worker = REPOSITORY / "tests" / "distributed" / "continued_worker.py"
        run = run_deepspeed(1, worker, [str(folder)], extensions, timeout=500)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def outcome(folder):
    found = json.loads((folder / "outcome.json").read_text())
    assert found["whole"]["done"] is True
    return found


def numbers(out) -> list[tuple]:
    return [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in json_lines(out / "metrics.jsonl")]


def difference(out, expected) -> float:
    """The largest relative difference of two adapters."""
    found, wanted = read_adapter(out / "adapter")[1], read_adapter(expected / "adapter")[1]
    assert found.keys() == wanted.keys()
    return max(relative(found[name], tensor) for name, tensor in wanted.items())


def cosine(rate: float, step: int, steps: int) -> float:
    return rate * 0.5 * (1 + math.cos(math.pi * step / steps))


def test_a_finished_run_is_left_as_it_is_without_loading_a_model(outcome):
    """Also if it is asked for fewer steps, or with another learning rate."""
    for name in ("finished", "finished early"):
        assert outcome[name]["done"] is True and not outcome[name]["loaded"]
        assert ", no step left to train\nthe run is finished, its adapter is " in outcome[name]["printed"]
    assert outcome["unchanged"]["done"] is True


def test_a_run_killed_before_its_adapter_was_written_writes_it_and_repeats_no_line(outcome, folder):
    assert outcome["no adapter"]["done"] is True and outcome["no adapter"]["loaded"]
    assert difference(folder / "no_adapter", folder / "whole") == 0
    for log in ("metrics.jsonl", "evaluations.jsonl", "router_load.jsonl"):
        assert (folder / "no_adapter" / log).read_bytes() == (folder / "whole" / log).read_bytes()


def test_the_same_settings_end_bit_equal_and_nothing_is_said(outcome, folder):
    assert outcome["same"]["done"] is True
    assert "by DeepSpeed's own files" in outcome["same"]["printed"]
    assert all(words not in outcome["same"]["printed"] for words in ("from here on", "not compared"))
    assert numbers(folder / "same") == numbers(folder / "whole")
    assert difference(folder / "same", folder / "whole") == 0


@pytest.mark.parametrize(
    ("name", "out", "route"),
    [
        ("changed", "changed", "by DeepSpeed's own files (same layout)"),
        ("changed and moved", "moved", "by the canonical state (another layout: zero_stage 2 -> 1; dropout draws new"),
    ],
)
def test_another_learning_rate_and_another_end_take_effect_and_are_said(name, out, route, outcome, folder):
    assert outcome[name]["done"] is True
    assert route in outcome[name]["printed"]
    assert (
        "\nfrom here on: learning_rate 0.01 -> 0.001, weight_decay 0.0 -> 0.1, max_steps 4 -> 6\n"
        in (outcome[name]["printed"])
    )
    lines = numbers(folder / out)
    assert [line[0] for line in lines] == list(range(1, STEPS + 3))
    assert [line[3] for line in lines[:MIDDLE]] == [cosine(RATE, step, STEPS) for step in range(1, MIDDLE + 1)]
    later = range(MIDDLE + 1, STEPS + 3)
    assert [line[3] for line in lines[MIDDLE:]] == [cosine(1e-3, step, STEPS + 2) for step in later]
    config = yaml.safe_load((folder / out / "config.yaml").read_text())
    assert (config["learning_rate"], config["weight_decay"], config["max_steps"]) == (1e-3, 0.1, STEPS + 2)
    last = json.loads((folder / out / "checkpoints" / f"step_{STEPS + 2}" / "state.json").read_text())
    assert [group["weight_decay"] for group in last["optimizer"]["groups"]] == [0.1]


def test_both_routes_train_the_same_with_the_changed_settings(outcome, folder):
    assert difference(folder / "moved", folder / "changed") <= TOLERANCE
    assert difference(folder / "changed", folder / "whole") > 1e-3


def test_a_checkpoint_of_an_earlier_version_is_continued_and_what_it_does_not_say_is_named(outcome, folder):
    assert outcome["older"]["done"] is True
    assert (
        "\nnot compared, the checkpoint does not say: tp_plan, deepspeed, settings, data_content, base_weights\n"
        in (outcome["older"]["printed"])
    )
    assert difference(folder / "older", folder / "whole") == 0


def test_no_pickle_of_a_foreign_checkpoint_is_opened(outcome, folder):
    assert outcome["foreign"]["done"] is True
    assert "by the canonical state (another run's folder; dropout draws new masks)" in outcome["foreign"]["printed"]
    assert not (folder / "opened").exists()
    assert difference(folder / "mine", folder / "whole") <= TOLERANCE
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        torch.load(next((folder / "theirs").rglob("*optim_states.pt")), weights_only=True)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("another shape", "has shape [3], which is not this model's"),
        ("another name", "stored and trained parameters differ in exp_avg, first "),
        ("no kind", "has no exp_avg_sq of the parameters, which AdamW needs"),
        ("another step", "a parameter was not stepped 2 times"),
        ("no tensors", "cannot be read: "),
    ],
)
def test_a_foreign_state_that_does_not_fit_is_one_line(name, fault, outcome):
    assert isinstance(outcome[name]["done"], str) and fault in outcome[name]["done"]
    assert "\n" not in outcome[name]["done"]


def test_other_content_under_the_same_path_is_refused_before_the_model_is_loaded(outcome, folder):
    data, weights = outcome["other data"], outcome["other weights"]
    assert f"data_content.dataset '{folder / 'data.jsonl'}' = 40 records, " in data["done"]
    assert ", this run has 41 records, " in data["done"]
    assert "was written with base_weights = " in weights["done"]
    for refused in (data, weights):
        assert "the content has changed under the same name: restore it or choose another" in refused["done"]
        assert not refused["loaded"]
