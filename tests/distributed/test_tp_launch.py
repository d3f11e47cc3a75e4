"""The launcher under TP2 x DP2 with ZeRO-3: real GSM8K records, an adapter that one process reproduces, a resume."""

import os
import shutil

import pytest
import torch

from comol_ds.adapters.adapter_folder import read_adapter
from tests.data.data_helpers import real_data
from tests.distributed.launching import REPOSITORY, run_deepspeed
from tests.distributed.run_folders import assert_one_process_reproduces_the_evaluation, json_lines
from tests.tiny_models import save_tiny_model

pytestmark = [pytest.mark.distributed, pytest.mark.exhaustive]  # CI launches the like by README's command
LAUNCHER = REPOSITORY / "launch" / "train.py"
STEPS = 6


def arguments(model, output, *extra: str) -> list[str]:
    settings = {
        "ds_config": REPOSITORY / "ds_configs" / "zero3_tp2.json", "model_name_or_path": model,
        "dataset": real_data("gsm8k/train.jsonl"), "output_dir": output, "max_steps": STEPS, "save_steps": 3,
        "max_train_records": 40, "max_eval_records": 10, "max_generate_records": 4, "max_new_tokens": 4,
        "per_device_train_batch_size": 2, "global_batch_size": 8, "max_length": 512, "lora_dropout": 0.1,
        "learning_rate": 5e-3, "logging_steps": 1, "consistency_check_steps": 2, "activation_checkpointing": "full",
    }  # fmt: skip
    return [*(word for name, value in settings.items() for word in (f"--{name}", str(value))), *extra]


@pytest.fixture(scope="module")
def first_run(tmp_path_factory, extensions):
    """(model folder, run folder, what rank 0 printed)"""
    folder = tmp_path_factory.mktemp("run")
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    model = save_tiny_model(folder / "model")
    run = run_deepspeed(4, LAUNCHER, arguments(model, folder / "out"), extensions)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    yield model, folder / "out", run.stdout
    del os.environ["HF_DATASETS_CACHE"]


def test_the_run_says_how_the_ranks_are_divided(first_run):
    assert "batches: 2 micro x 2 accumulation x 2 data-parallel = 8 global;" in first_run[2]
    assert "2 tensor-parallel x 2 data-parallel = 4 ranks" in first_run[2]
    assert [line["step"] for line in json_lines(first_run[1] / "metrics.jsonl")] == list(range(1, STEPS + 1))


def test_one_process_reproduces_the_evaluation(first_run):
    model, out, _ = first_run
    assert_one_process_reproduces_the_evaluation(model, out, generated=4)


def cut_back(out, copy) -> None:
    """A copy of a run folder as it was after the checkpoint of step 3."""
    shutil.copytree(out, copy)
    shutil.rmtree(copy / "adapter")
    shutil.rmtree(copy / "checkpoints" / f"step_{STEPS}")


def test_resume_is_bit_equal_at_the_same_layout(first_run, tmp_path, extensions):
    model, out, _ = first_run
    cut_back(out, copy := tmp_path / "out")
    run = run_deepspeed(4, LAUNCHER, arguments(model, copy, "--resume_from_checkpoint"), extensions)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    assert f"step 3 of {STEPS}, by DeepSpeed's own files (same layout)" in run.stdout
    before, after = (
        [(line["step"], line["loss"], line["grad_norm"]) for line in json_lines(folder / "metrics.jsonl")]
        for folder in (out, copy)
    )
    assert after == before
    expected, found = read_adapter(out / "adapter")[1], read_adapter(copy / "adapter")[1]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_resume_goes_on_without_tensor_parallelism(first_run, tmp_path, extensions):
    """Dropout draws new masks, so the losses are near those of the uninterrupted run, not equal."""
    model, out, _ = first_run
    cut_back(out, copy := tmp_path / "out")
    words = arguments(model, copy, "--resume_from_checkpoint", "--ds_config", "ds_configs/zero3.json")
    run = run_deepspeed(4, LAUNCHER, words, extensions)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    assert f"step 3 of {STEPS}, by the canonical state (another layout: " in run.stdout
    assert "tensor_parallel 2 -> 1" in run.stdout
    before, after = (json_lines(folder / "metrics.jsonl") for folder in (out, copy))
    assert [(line["step"], line["tokens"], line["lr"]) for line in after] == [
        (line["step"], line["tokens"], line["lr"]) for line in before
    ]
    losses = [line["loss"] for line in before]
    assert [line["loss"] for line in after] == pytest.approx(losses, rel=0.02)
    assert [line["loss"] for line in after[:3]] == losses[:3]
