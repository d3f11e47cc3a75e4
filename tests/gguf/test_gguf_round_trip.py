"""The static LoRA in llama.cpp: folder -> its converter -> GGUF -> its own arithmetic, against PEFT in fp32.

Needs llama-cpp-python in an environment of its own, which takes some five minutes to compile, and the converter, which
its wheel leaves out and its source archive has:

    python3 -m venv V
    V/bin/pip install --no-binary llama-cpp-python llama-cpp-python==0.3.36
    V/bin/pip download --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36 -d V && tar -xzf V/*.tar.gz -C V
    COMOL_LLAMACPP_PYTHON=V/bin/python COMOL_LLAMACPP_SOURCE=V/llama_cpp_python-0.3.36/vendor/llama.cpp pytest -m gguf
"""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig

from comol_ds.export.lora_folder import write_lora
from comol_ds.export.static_lora import StaticLora
from comol_ds.export.validate import check_folder

pytestmark = pytest.mark.gguf
WORKER = Path(__file__).with_name("llamacpp_worker.py")
VOCABULARY, RANK, TOKENS = 400, 8, 32


def from_environment(variable: str, what: str) -> Path:
    path = Path(os.environ.get(variable, ""))
    if variable in os.environ and path.exists():
        return path
    message = f"{what} is missing: set {variable}"
    if os.environ.get("COMOL_REQUIRE_ALL") == "1":
        pytest.fail(message)
    pytest.skip(message)


def save_base(folder: Path) -> Path:
    """A tiny Llama with a SentencePiece tokenizer, which the converter reads from its model file."""
    folder.mkdir()
    letters = random.Random(0)
    words = ["".join(letters.choices("abcdefghijklmnopqrstuvwxyz", k=letters.randint(2, 7))) for _ in range(400)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(letters.choices(words, k=12)) for _ in range(500)),
        model_prefix=str(folder / "tokenizer"), vocab_size=VOCABULARY, model_type="bpe", byte_fallback=True,
        minloglevel=2,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def static_lora(base: Path) -> StaticLora:
    generator = torch.Generator().manual_seed(1)
    down, up = {}, {}
    for name, module in AutoModelForCausalLM.from_pretrained(base).named_modules():
        if name.endswith(("q_proj", "v_proj", "o_proj", "down_proj")):
            down[name] = torch.randn(RANK, module.in_features, generator=generator) / 4
            up[name] = torch.randn(module.out_features, RANK, generator=generator) / 4
    return StaticLora(down, up, RANK)


def run(*command: str | Path) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_llamacpp_computes_what_peft_computes(tmp_path):
    source = from_environment("COMOL_LLAMACPP_SOURCE", "llama.cpp's converter")
    python = from_environment("COMOL_LLAMACPP_PYTHON", "llama-cpp-python")
    base, lora = save_base(tmp_path / "base"), tmp_path / "lora"
    write_lora(static_lora(base), base, lora)
    assert check_folder(lora, "llamacpp") == []
    run(sys.executable, source / "convert_hf_to_gguf.py", base, "--outtype", "f32", "--outfile", tmp_path / "base.gguf")
    run(sys.executable, source / "convert_lora_to_gguf.py", lora, "--base", base, "--outfile", tmp_path / "lora.gguf")
    ids = torch.randint(3, VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(2))
    np.save(tmp_path / "ids.npy", ids[0].numpy())
    run(python, WORKER, tmp_path)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora).eval()
    with torch.no_grad():
        adapted = model(ids).logits[0]
        with model.disable_adapter():
            plain = model(ids).logits[0]
    served = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    assert (adapted - plain).abs().max() > 0.1
    assert (served - adapted).abs().max() < 1e-4
