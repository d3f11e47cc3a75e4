"""transformers' own tensor parallelism on hf-exact checkpoints, by the plan that the modelling code extends."""

import sys
from pathlib import Path

import pytest
import torch

from comol_ds.adapters.adapter_folder import read_adapter
from comol_ds.export.hf_exact import write_hf_exact
from tests.distributed.launching import clean_environment, free_port, run_limited
from tests.tiny_models import save_tiny_model
from tests.trained_adapters import save_trained_adapter

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

WORKER = Path(__file__).with_name("hf_exact_ranks.py")


def test_two_ranks_compute_what_was_trained(tmp_path):
    """With biases, and a router on the input, whose logits the ranks of a row-parallel Linear sum."""
    trained = save_trained_adapter(
        tmp_path / "adapter", save_tiny_model(tmp_path / "base", "llama_bias"), router="input", num_experts=3
    )
    write_hf_exact(tmp_path / "base", *read_adapter(tmp_path / "adapter"), tmp_path / "served")
    input_ids = torch.randint(3, 400, (2, 24), generator=torch.Generator().manual_seed(5))
    torch.save(input_ids, tmp_path / "ids.pt")
    port = free_port()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    paths = [str(tmp_path / name) for name in ("served", "ids.pt", "logits.pt")]
    environment = clean_environment(tmp_path / "extensions") | {"HF_HOME": str(tmp_path / "hf")}
    done = run_limited([*launcher, str(WORKER), *paths], environment, 240, tmp_path, port)
    assert done.returncode == 0, done.stderr[-3000:]
    logits, shapes = torch.load(tmp_path / "logits.pt")
    with torch.no_grad():
        expected = trained(input_ids=input_ids).logits
    assert (logits - expected).abs().max() <= 1e-5
    q, down = "self_attn.q_proj.", "mlp.down_proj."
    assert shapes[f"{q}base_layer.weight"] == (16, 32) and shapes[f"{q}comol_B.weight"] == (16, 4)
    assert shapes[f"{q}comol_A.weight"] == (4, 32) and shapes[f"{q}comol_router.weight"] == (3, 32)
    assert shapes[f"{down}base_layer.weight"] == (32, 24) and shapes[f"{down}comol_B.weight"] == (32, 4)
    assert shapes[f"{down}comol_A.weight"] == (4, 24) and shapes[f"{down}comol_router.weight"] == (3, 24)
