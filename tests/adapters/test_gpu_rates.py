"""The gpu suite without a GPU: what it counts, what it refuses, and its rates at sizes that say nothing about speed."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from comol_ds import CoMoLConfig
from comol_ds.adapters.mixing import mix_cores
from comol_ds.benchmark.geometry import LLAMA_3_1_70B
from comol_ds.benchmark.gpu_rates import (
    LAYER_CONTENDERS,
    RatesCase,
    layer_bytes,
    measure_rates,
    mixing_bytes,
    mixing_flops,
)
from comol_ds.benchmark.mfu import PEAK_TFLOPS, flops_per_token, peak_flops
from tests.adapters.require_triton import require_triton

ROOT = Path(__file__).parents[2]
# the counter knows attention as products of matrices, not as the CPU's fused kernel
LLAMA = LlamaConfig(
    vocab_size=96, hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, attn_implementation="eager",
)  # fmt: skip
ROWS, TOKENS = 2, 16
SMALL = RatesCase(
    device="cpu", copied_bytes=1 << 16, square=32, mixed_tokens=(24,), layer_tokens=16, in_features=24,
    out_features=(20,), ranks=(8,), experts=(2, 4), rounds=2, calls=2,
)  # fmt: skip


@pytest.fixture
def command():
    return runpy.run_path(str(ROOT / "launch" / "benchmark.py"))


def counted_flops(model: torch.nn.Module) -> int:
    """FLOPs of forward and backward over ROWS rows, logits everywhere; the input needs a gradient, as with
    checkpointing."""
    x = torch.randn(ROWS, TOKENS, LLAMA.hidden_size, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=x, use_cache=False).logits.sum().backward()
    return counter.get_total_flops()


def test_flops_of_a_frozen_llama_are_those_that_torch_counts():
    model = LlamaForCausalLM(LLAMA).requires_grad_(False)
    assert counted_flops(model) == ROWS * TOKENS * flops_per_token(LLAMA, TOKENS)


def test_an_adapters_products_come_on_top(monkeypatch):
    monkeypatch.setenv("COMOL_KERNEL", "torch")
    targets = ["q_proj", "o_proj", "down_proj"]
    model = get_peft_model(LlamaForCausalLM(LLAMA), CoMoLConfig(r=4, num_experts=3, target_modules=targets))
    r, e, hidden, intermediate = 4, 3, LLAMA.hidden_size, LLAMA.intermediate_size
    matrices = r * (hidden + hidden) * 2 + r * (intermediate + hidden)
    # A, B, router and cores, forward and both gradients; the gradients of gates and tokens are a product each
    adapter = LLAMA.num_hidden_layers * (6 * matrices + 3 * (6 * e * r + 6 * e * r * r + 4 * e * r))
    assert counted_flops(model) == ROWS * TOKENS * (flops_per_token(LLAMA, TOKENS) + adapter)


def test_flops_of_llama_3_1_70b():
    config = LlamaConfig(**LLAMA_3_1_70B, num_hidden_layers=80)
    layer = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672
    assert flops_per_token(config, 2048) == 4 * (80 * layer + 8192 * 128256) + 12 * 80 * 8192 * 2048


def test_a_peak_is_given_or_known_but_never_guessed():
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H200 MIG 1g.18gb") is None, "a slice of a device"
    assert peak_flops("NVIDIA H200", tflops=500.0) == peak_flops("unheard of", tflops=500.0) == 500e12
    assert set(PEAK_TFLOPS.values()) == {312, 989, 835, 756}


def test_without_a_gpu_the_suite_is_refused_on_one_line(tmp_path):
    out = tmp_path / "out.json"
    words = [sys.executable, str(ROOT / "launch" / "benchmark.py"), "gpu", "--json", str(out)]
    without = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(words, env=without, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == (
        "benchmark.py: error: gpu needs a CUDA device and torch sees none: run it on a machine with a GPU, or run"
        " layer, step and collectives, which also run on a CPU\n"
    )
    assert not out.exists()


def test_a_size_that_70b_does_not_have_is_refused(command, capsys):
    with pytest.raises(SystemExit) as stop:
        command["parse"](["gpu", "--layers", "81"])
    assert stop.value.code == 2
    assert "--layers: invalid choice: 81" in capsys.readouterr().err


def test_flops_and_bytes_of_the_mixture_are_those_of_its_products_and_tensors(monkeypatch):
    monkeypatch.setenv("COMOL_KERNEL", "torch")
    n, r, e = 24, 8, 3
    h, p, cores = (torch.randn(shape, requires_grad=True) for shape in ((n, r), (n, e), (e, r, r)))
    with FlopCounterMode(display=False) as counter:
        o = mix_cores(h, p, cores, 1.0)
        assert counter.get_total_flops() == mixing_flops(n, r, e, backward=False)
        o.sum().backward()
    sums = 4 * n * e * r  # which the torch kernel does as products with one row or column
    assert counter.get_total_flops() == mixing_flops(n, r, e, backward=True) + sums
    forward = sum(tensor.numel() for tensor in (h, p, cores, o))
    backward = sum(tensor.numel() for tensor in (h, p, cores, o, h.grad, p.grad, cores.grad))
    assert mixing_bytes(n, r, e, backward=False) == 2 * forward
    assert mixing_bytes(n, r, e, backward=True) == 2 * (forward + backward)


def test_bytes_of_a_layer_are_those_of_its_large_tensors():
    n, i, o, r = 16, 24, 20, 8
    forward = n * (i + o) + r * (i + o)
    backward = n * (i + o) + n * i + 2 * r * (i + o)
    assert layer_bytes(n, i, o, r) == 2 * (forward + backward)


def test_rates_on_a_cpu(monkeypatch, capsys):
    monkeypatch.delenv("COMOL_KERNEL", raising=False)
    result = json.loads(json.dumps(measure_rates(SMALL)))
    assert result["device"] == "cpu" and result["bytes_per_second"] > 0 and result["flops_per_second"] > 0
    assert [(row["sizes"], row["kernel"], row["pass"]) for row in result["mixing"]] == [
        ([24, 8, num_experts], "torch", name) for num_experts in (2, 4) for name in ("forward", "forward + backward")
    ]
    for row in result["mixing"]:
        n, r, num_experts = row["sizes"]
        backward, seconds = row["pass"] != "forward", row["seconds"]["median"]
        nbytes, flops = (count(n, r, num_experts, backward) for count in (mixing_bytes, mixing_flops))
        assert row["of_bandwidth"] * seconds * result["bytes_per_second"] == pytest.approx(nbytes)
        assert row["of_products"] * seconds * result["flops_per_second"] == pytest.approx(flops)
        assert row["to_torch"] == 1
    for layer in result["layers"]:
        assert layer["case"]["dtype"] == "bf16" and set(layer["milliseconds"]) == set(LAYER_CONTENDERS)
        seconds = layer["milliseconds"]["lora"]["median"] / 1e3
        assert layer["of_bandwidth"]["lora"] * seconds * result["bytes_per_second"] == pytest.approx(
            layer_bytes(16, 24, 20, 8)
        )
        assert layer["of_products"]["lora"] * seconds * result["flops_per_second"] == pytest.approx(
            layer["flops"]["lora"]
        )
    printed = capsys.readouterr().out
    assert "cpu: copies" in printed and "N=24" in printed and "24 -> 20" in printed


def test_tritons_kernel_is_measured_beside_torchs_where_a_run_would_take_it(monkeypatch):
    require_triton()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("COMOL_KERNEL", "triton")
    mixing = measure_rates(SMALL)["mixing"]
    assert [row["kernel"] for row in mixing] == ["triton", "triton", "torch", "torch"] * 2
    assert all(row["to_torch"] != 1 for row in mixing if row["kernel"] == "triton")
