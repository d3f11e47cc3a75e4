"""Runs under the Python that has llama-cpp-python: logits of base.gguf with lora.gguf for ids.npy, in one folder."""

import sys
from pathlib import Path

import numpy as np
from llama_cpp import GGML_TYPE_F32, Llama

folder = Path(sys.argv[1])
ids = np.load(folder / "ids.npy")
model = Llama(
    str(folder / "base.gguf"),
    lora_path=str(folder / "lora.gguf"),
    logits_all=True,
    n_ctx=64,
    n_threads=1,
    type_k=GGML_TYPE_F32,  # the default cache, fp16, costs 2e-3
    type_v=GGML_TYPE_F32,
    verbose=False,
)
model.eval(ids.tolist())
np.save(folder / "logits.npy", model.scores[: len(ids)])
