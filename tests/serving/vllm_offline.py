"""Runs vLLM's offline engine in its own environment: token ids in, log-probabilities of the whole vocabulary out.

A start takes 15 to 35 seconds on two cores, so a scenario is a list of steps that one start goes through.
"""

import json
import os
import signal
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("vllm_worker.py")
LIMIT_S = 300  # a start on a machine that is busy with other things

# vLLM 0.32 wraps lm_head too unless told otherwise, and then fails on prompt_logprobs of several sequences: it applies
# the LoRA of a sequence's last position to all of its positions. Names are those of vLLM's own fused modules.
DECODER_LINEARS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


def vllm_python() -> Path:
    """The vLLM environment's interpreter, which may not exist."""
    return Path(os.environ.get("COMOL_VLLM_PYTHON") or ROOT / ".venv-vllm" / "bin" / "python")


@dataclass(frozen=True)
class Request:
    """A prompt, and the LoRA folder that serves it; None is the base."""

    token_ids: list[int]
    adapter: Path | None = None


@dataclass(frozen=True)
class Score:
    """Requests submitted together, each continued greedily by `new_tokens`; the result is a list of `Scored`."""

    requests: list[Request]
    new_tokens: int = 0


@dataclass(frozen=True)
class Load:
    """Load a LoRA folder; the result is vLLM's error as text, or None."""

    adapter: Path


@dataclass(frozen=True)
class Unload:
    """Drop a LoRA folder; the result is an error as text, or None."""

    adapter: Path


@dataclass(frozen=True)
class Scored:
    """token_ids [T], prompt and continuation; logprobs [T - 1, V], row t predicting token t + 1."""

    token_ids: torch.Tensor
    logprobs: torch.Tensor


def run_vllm(
    model: Path,
    steps: list[Score | Load | Unload],
    *,
    tensor_parallel: int = 1,
    environment: dict[str, str] | None = None,
    **engine,
) -> list[list[Scored] | str | None]:
    """One entry per step, as its class says.

    Args:
        model: a model folder with fp32 weights.
        steps: what the engine does, one after the other.
        tensor_parallel: number of vLLM's worker processes.
        environment: variables beside ours.
        engine: further arguments of vllm.LLM, such as enable_lora, max_lora_rank, max_loras, model_impl.

    Raises:
        RuntimeError: vLLM ended with an error or ran past LIMIT_S; the end of its output is in the message.
    """
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    job = {
        "engine": {
            "model": str(model),
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 128,
            "max_num_seqs": 16,
            "max_logprobs": vocabulary,
            "tensor_parallel_size": tensor_parallel,
            "disable_log_stats": True,
            **({"distributed_executor_backend": "uni"} if tensor_parallel == 1 else {}),
            **({"lora_target_modules": list(DECODER_LINEARS)} if engine.get("enable_lora") else {}),
            **engine,
        },
        "vocabulary": vocabulary,
        "steps": _as_json(steps),
    }
    with tempfile.TemporaryDirectory() as scratch:
        job_path, results_path = Path(scratch, "job.json"), Path(scratch, "results.pt")
        job_path.write_text(json.dumps(job))
        output = _run([str(vllm_python()), str(WORKER), str(job_path), str(results_path)], environment or {})
        if not results_path.exists():
            raise RuntimeError(f"vLLM ended without results:\n{output[-30000:]}")
        results = torch.load(results_path, weights_only=True)
    return [[Scored(*one) for one in result] if isinstance(result, list) else result for result in results]


def exact_logprobs(model: torch.nn.Module, scored: Scored) -> torch.Tensor:
    """What a transformers model says for the same tokens, [T - 1, V], all in one pass without a cache."""
    with torch.no_grad():
        logits = model(input_ids=scored.token_ids[None]).logits[0, :-1]
    return torch.log_softmax(logits.float(), dim=-1)


def _as_json(steps: list[Score | Load | Unload]) -> list[dict]:
    numbers: dict[Path, int] = {}

    def adapter(folder: Path | None) -> dict | None:
        return folder and {"id": numbers.setdefault(folder, len(numbers) + 1), "path": str(folder)}

    written = []
    for step in steps:
        if isinstance(step, Score):
            requests = [{"token_ids": r.token_ids, "adapter": adapter(r.adapter)} for r in step.requests]
            written.append({"do": "score", "new_tokens": step.new_tokens, "requests": requests})
        else:
            written.append({"do": type(step).__name__.lower(), "adapter": adapter(step.adapter)})
    return written


def _run(command: list[str], environment: dict[str, str]) -> str:
    """The output of a command; its whole process group ends with it, vLLM's workers included."""
    ours = {
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        # The engine in the process that asks: one import of vLLM fewer. Workers of tensor parallelism stay processes.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # Workers do not end by themselves: 1 second until they are told to, not 5.
        "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    # PYTHONPATH would put the test environment's packages in front of vLLM's.
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=inherited | ours | environment,
        start_new_session=True,
    )
    try:
        return process.communicate(timeout=LIMIT_S)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise RuntimeError(f"vLLM ran past {LIMIT_S} s:\n{process.communicate()[0][-30000:]}") from None
