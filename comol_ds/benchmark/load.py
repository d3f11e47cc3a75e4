"""Loading a checkpoint on several ranks of one machine: time, bytes read and host memory, side by side.

The contenders, each up to an adapted model whose base holds the checkpoint's values:
    comol_ds      this package, ZeRO-3: every rank reads its partitions
    transformers  from_pretrained under ZeRO-3: rank 0 reads and broadcasts
    comol_ds-tp   this package, ZeRO-3 x tensor parallelism over all ranks: every rank reads its slices
They take turns within every round, each in processes of its own and after the files have left the page cache.
"""

import json
import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from comol_ds.benchmark.figures import in_turns, median_ratio, sizes, spread
from comol_ds.benchmark.processes import run_ranks

CONTENDERS = ("comol_ds", "transformers", "comol_ds-tp")
REFERENCE = "transformers"
_LIMIT_SECONDS = 900
_FILE_BYTES = 1 << 29


@dataclass(frozen=True)
class LoadCase:
    """A random bf16 Llama of at least ``gigabytes`` (2^30 bytes) in ``folder``, loaded by ``ranks`` processes."""

    folder: Path
    gigabytes: float = 2.0
    ranks: int = 2


def measure_load(case: LoadCase, rounds: int) -> dict:
    """Write the checkpoint and load it ``rounds`` times with every contender.

    Returns:
        A dictionary that can be written as JSON; ratios are the median over rounds of contender / transformers.
    """
    model = case.folder / "model"
    size = write_checkpoint(model, int(case.gigabytes * 2**30))
    runs: dict[str, list[list[dict]]] = {name: [] for name in CONTENDERS}
    for name, _ in in_turns(CONTENDERS, rounds):
        runs[name].append(load_once(case, model, name))
    seconds = {name: [max(rank["seconds"] for rank in run) for run in results] for name, results in runs.items()}
    return {
        "case": sizes(case) | {"bytes": size},
        "rounds": rounds,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "ratio_to_transformers": {name: median_ratio(values, seconds[REFERENCE]) for name, values in seconds.items()},
        "ranks": {
            name: [_worst([run[rank] for run in results]) for rank in range(case.ranks)]
            for name, results in runs.items()
        },
    }


def write_checkpoint(folder: Path, size: int) -> int:
    """A Llama with as many layers as make at least ``size`` bytes, in files of half a gigabyte; returns its bytes."""
    settings = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_attention_heads=16, num_key_value_heads=8,
        num_hidden_layers=1, dtype="bfloat16",
    )  # fmt: skip
    shapes = _shapes(settings)
    layer = sum(2 * shape.numel() for name, shape in shapes.items() if ".layers.0." in name)
    ends = sum(2 * shape.numel() for shape in shapes.values()) - layer
    settings.num_hidden_layers = max(1, math.ceil((size - ends) / layer))
    settings.layer_types = None
    settings.save_pretrained(folder)
    generator, weight_map = torch.Generator().manual_seed(0), {}
    for number, names in enumerate(_files(shapes := _shapes(settings))):
        file = f"model-{number:05}.safetensors"
        tensors = {
            name: torch.empty(shapes[name], dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
            for name in names
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(2 * shape.numel() for shape in shapes.values())


def load_once(case: LoadCase, model: Path, contender: str) -> list[dict]:
    """One load in fresh processes; what each rank measured, see load_rank.

    Raises:
        RuntimeError, subprocess.TimeoutExpired: as `run_ranks` does.
    """
    for file in model.glob("*.safetensors"):
        _drop_from_page_cache(file)
    with tempfile.TemporaryDirectory() as output:
        words = ["--module", "comol_ds.benchmark.load_rank", str(model), contender, output]
        run_ranks(case.ranks, words, contender, _LIMIT_SECONDS)
        return [json.loads((Path(output) / f"{rank}.json").read_text()) for rank in range(case.ranks)]


def table(result: dict) -> str:
    """The result as text, one line per contender and rank."""
    case = result["case"]
    lines = [
        f"{case['bytes'] / 2**30:.2f} GiB bf16 on {case['ranks']} ranks, {result['rounds']} rounds; GiB, the worst of"
        " the rounds; held: the rank's part of the files; asked and disk: read by system calls, and from the disk;"
        " memory: peak anonymous memory above the rank's part of the model",
        f"{'':14}{'rank':>5}{'seconds':>9}{'x transformers':>16}{'held':>8}{'asked':>8}{'disk':>8}{'memory':>9}",
    ]
    for name, ranks in result["ranks"].items():
        for number, rank in enumerate(ranks):
            figures = [rank[key] / 2**30 for key in ("held_bytes", "asked_bytes", "disk_bytes", "excess_bytes")]
            seconds, ratio = result["seconds"][name]["median"], result["ratio_to_transformers"][name]
            lines.append(
                f"{name:14}{number:5}{seconds:9.2f}{ratio:16.2f}" + "".join(f"{value:8.2f}" for value in figures)
            )
    return "\n".join(lines)


def _shapes(settings: LlamaConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings, trust_remote_code=False)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _files(shapes: dict[str, torch.Size]) -> list[list[str]]:
    """Names in the model's order, in groups of about _FILE_BYTES."""
    files, filled = [[]], 0
    for name, shape in shapes.items():
        if filled > _FILE_BYTES:
            files, filled = [*files, []], 0
        files[-1].append(name)
        filled += 2 * shape.numel()
    return files


def _drop_from_page_cache(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())  # what is not yet on the disk cannot be dropped
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _worst(rounds: list[dict]) -> dict:
    """Every figure's largest value over the rounds."""
    return {key: max(measured[key] for measured in rounds) for key in rounds[0]}
