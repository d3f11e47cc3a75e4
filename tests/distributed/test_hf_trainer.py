"""The same adapters under transformers' own Trainer with ds_configs/zero3.json, on two ranks."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from comol_ds.adapters.adapter_folder import read_adapter
from tests.distributed.launching import run_deepspeed
from tests.distributed.run_folders import json_lines
from tests.tiny_models import random_batch, save_tiny_model

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def output(model, tmp_path_factory, extensions):
    """What Trainer wrote on two ranks."""
    folder = tmp_path_factory.mktemp("trainer") / "out"
    run = run_deepspeed(2, Path(__file__).parent / "trainer_worker.py", [str(model), str(folder)], extensions)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return folder


def test_trainer_saves_a_whole_adapter(model, output):
    config, tensors = read_adapter(output)  # refuses empty and misshapen tensors
    assert config.num_experts == 3
    assert len(tensors) == 2 * 7 * 4  # layers x Linears x parameters
    assert all(tensor.abs().max() > 0 for name, tensor in tensors.items() if name.endswith("comol_B"))
    losses = torch.load(output / "losses.pt")
    assert len(losses) == 4 and losses[-1] < losses[0]
    reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(output))
    parameters = dict(reloaded.named_parameters())
    for name, tensor in tensors.items():
        assert torch.equal(parameters[f"{name}.default"], tensor)


def test_callback_writes_the_router_load_of_both_ranks(output):
    lines = json_lines(output / "router_load.jsonl")
    assert [(line["step"], line["split"]) for line in lines] == [(step, "train") for step in range(1, 5)]
    # four steps of two rows on each of two ranks: every one of the 16 rows once
    assert sum(line["tokens"]["all"] for line in lines) == int(random_batch(16, seed=0)["attention_mask"].sum())
    for line in lines:
        assert len(line["layers"]) == 14
        for layer in line["layers"].values():
            assert sum(layer["mean_gate"]) == pytest.approx(1, abs=1e-5)
            assert layer["update_ratio"] is not None and -1 <= layer["core_cosine"] <= 1
    assert all(layer["update_ratio"] > 0 for layer in lines[-1]["layers"].values())
