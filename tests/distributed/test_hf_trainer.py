"""The same adapters under transformers' own Trainer with ds_configs/zero3.json, on two ranks."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from comol_ds.adapters.adapter_folder import read_adapter
from tests.distributed.launching import run_deepspeed
from tests.tiny_models import save_tiny_model


@pytest.mark.distributed
def test_trainer_saves_a_whole_adapter(tmp_path, extensions):
    model = save_tiny_model(tmp_path / "model")
    output = tmp_path / "out"
    run = run_deepspeed(2, Path(__file__).parent / "trainer_worker.py", [str(model), str(output)], extensions)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
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
