"""Merging a static LoRA into a checkpoint: time beside a plain copy of its files, memory, and every bit of the result.

The contenders, each in a process of its own and with its files flushed to the disk at the end:
    copy    shutil.copyfile
    merge   merge_into_base, all seven projections of every layer
They take turns within every round, with the checkpoint in the page cache (warm) and after it has left it (cold).
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from comol_ds.benchmark.figures import in_turns, median_ratio, sizes, spread
from comol_ds.benchmark.load import write_checkpoint
from comol_ds.benchmark.processes import REPOSITORY
from comol_ds.export.source import weights_in
from comol_ds.tensor_files import StoredTensor

CACHES = ("warm", "cold")
CONTENDERS = ("copy", "merge")
_LIMIT_SECONDS = 300
_DELTA_STD = 1e-3  # of an element of B A; the checkpoint's weights have 0.02


@dataclass(frozen=True)
class MergeCase:
    """A random bf16 Llama of at least ``gigabytes`` (2^30 bytes) in files of half of one, and a LoRA of ``rank``."""

    folder: Path
    gigabytes: float = 2.0
    rank: int = 16

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def lora(self) -> Path:
        return self.folder / "lora.safetensors"

    def output(self, contender: str) -> Path:
        return self.folder / contender


def measure_merge(case: MergeCase, rounds: int) -> dict:
    """Write the checkpoint and the LoRA, copy and merge ``rounds`` times, compare the last merge.

    Returns:
        A dictionary that can be written as JSON. speed_to_copy: median over rounds of copy's seconds / merge's;
        peak_bytes: largest resident memory of a merge above what the process held before, LoRA included; block_bytes:
        of the largest tensor; differing: tensors that are not bit for bit what a merge in memory makes of them.
    """
    size = write_checkpoint(case.base, int(case.gigabytes * 2**30))
    tensors = weights_in(case.base).by_name
    save_file(_random_lora(tensors, case.rank), case.lora)
    runs: dict[tuple[str, str], list[dict]] = {(cache, name): [] for cache in CACHES for name in CONTENDERS}
    for key, _ in in_turns(list(runs), rounds):
        runs[key].append(_run_once(case, *key))
    seconds = {key: [run["seconds"] for run in results] for key, results in runs.items()}
    busy = {name: [run["cpu_seconds"] for cache in CACHES for run in runs[cache, name]] for name in CONTENDERS}
    return {
        "case": sizes(case) | {"bytes": size},
        "rounds": rounds,
        "seconds": {cache: {name: spread(seconds[cache, name]) for name in CONTENDERS} for cache in CACHES},
        "cpu_seconds": {name: spread(values) for name, values in busy.items()},
        "speed_to_copy": {cache: median_ratio(seconds[cache, "copy"], seconds[cache, "merge"]) for cache in CACHES},
        "peak_bytes": max(run["peak_bytes"] for cache in CACHES for run in runs[cache, "merge"]),
        "block_bytes": max(tensor.stop - tensor.start for tensor in tensors.values()),
        "differing": differing_tensors(case),
    }


def table(result: dict) -> str:
    """The result as text, one line per state of the page cache."""
    case = result["case"]
    lines = [
        f"{case['bytes'] / 2**30:.2f} GiB bf16, rank {case['rank']}, {result['rounds']} rounds; seconds are medians,"
        " speed is the median of copy / merge",
        f"{'cache':8}{'copy s':>9}{'merge s':>9}{'speed':>8}",
    ]
    for cache, seconds in result["seconds"].items():
        copy, merge = (seconds[name]["median"] for name in CONTENDERS)
        lines.append(f"{cache:8}{copy:9.2f}{merge:9.2f}{result['speed_to_copy'][cache]:8.2f}")
    busy = ", ".join(f"{name} {result['cpu_seconds'][name]['median']:.2f}" for name in CONTENDERS)
    lines.append(f"CPU seconds: {busy}")
    peak, block = (result[key] / 2**20 for key in ("peak_bytes", "block_bytes"))
    lines.append(f"peak memory of a merge {peak:.0f} MiB, largest tensor {block:.0f} MiB")
    lines.append(f"tensors that differ from a merge in memory: {len(result['differing'])} {result['differing'][:3]}")
    return "\n".join(lines)


def differing_tensors(case: MergeCase) -> list[str]:
    """Tensors of the merged checkpoint whose bits are not those of one whole fp32 product, one sum and one cast."""
    lora, merged, different = load_file(case.lora), weights_in(case.output("merge")), []
    for file, tensors in merged.by_file.items():
        with safe_open(case.base / file.name, "pt") as before, safe_open(file, "pt") as after:
            for tensor in tensors:
                expected, module = before.get_tensor(tensor.name), tensor.name.removesuffix(".weight")
                if f"{module}.down" in lora:
                    delta = lora[f"{module}.up"] @ lora[f"{module}.down"]  # [O, I]
                    expected = (expected.float() + delta).to(expected.dtype)
                if not torch.equal(after.get_tensor(tensor.name).view(torch.int16), expected.view(torch.int16)):
                    different.append(tensor.name)
    return different


def _random_lora(tensors: dict[str, StoredTensor], rank: int) -> dict[str, torch.Tensor]:
    """<module>.down [R, I] and .up [O, R] for every projection."""
    generator, lora = torch.Generator().manual_seed(1), {}
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            module, (outputs, inputs) = name.removesuffix(".weight"), tensor.shape
            lora[f"{module}.down"] = torch.randn(rank, inputs, generator=generator)
            lora[f"{module}.up"] = torch.randn(outputs, rank, generator=generator) * _DELTA_STD / rank**0.5
    return lora


def _run_once(case: MergeCase, cache: str, contender: str) -> dict:
    """One run in a fresh process; what it measured, see merge_process."""
    shutil.rmtree(case.output(contender), ignore_errors=True)
    os.sync()
    for file in case.base.glob("*.safetensors"):
        with file.open("rb") as stream:
            if cache == "cold":
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while stream.read(1 << 24):
                    pass
    words = [contender, str(case.base), str(case.lora), str(case.output(contender))]
    said = subprocess.run(
        [sys.executable, "-m", "comol_ds.benchmark.merge_process", *words], cwd=REPOSITORY, stdout=subprocess.PIPE,
        text=True, timeout=_LIMIT_SECONDS, check=True,
    )  # fmt: skip
    return json.loads(said.stdout.splitlines()[-1])
