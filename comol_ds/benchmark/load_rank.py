"""One rank of the loading benchmark: loads with one contender and writes what it took.

Usage: deepspeed --module comol_ds.benchmark.load_rank MODEL_FOLDER CONTENDER OUTPUT_FOLDER
"""

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from comol_ds.config import AdapterSettings, ModelSettings, RunConfig
from comol_ds.parallel import groups
from comol_ds.parallel.assemble import attach_adapter, build_model

_DS_CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


class PeakMemory:
    """The largest anonymous resident memory of this process while the block runs, sampled every 5 ms.

    Anonymous: without the pages of files, which the kernel can drop. The kernel's own high-water mark counts them.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes = max(self.bytes, anonymous_bytes())

    def _sample(self) -> None:
        while not self._stop.wait(0.005):
            self.bytes = max(self.bytes, anonymous_bytes())


def anonymous_bytes() -> int:
    return _proc("status", "RssAnon") * 1024


def load_with_comol_ds(config: RunConfig) -> torch.nn.Module:
    model, _ = build_model(config, config.model.model_name_or_path, _DS_CONFIG, True, groups.mesh())
    return model


def load_with_transformers(config: RunConfig) -> torch.nn.Module:
    hf_ds_config = HfDeepSpeedConfig(_DS_CONFIG)
    base = AutoModelForCausalLM.from_pretrained(
        config.model.model_name_or_path, dtype=torch.bfloat16, trust_remote_code=False
    )
    model = attach_adapter(base, config.adapter, config.run.seed)
    del hf_ds_config  # it lives until here: transformers finds it through a weak reference
    return model


def measure(load: Callable[[RunConfig], torch.nn.Module], config: RunConfig) -> dict[str, Any]:
    """Seconds until all ranks are done, bytes and peak memory of this one.

    Returns:
        seconds; held_bytes: this rank's part of the frozen base, which has the files' dtype; asked_bytes and
        disk_bytes: /proc/self/io's rchar and read_bytes; excess_bytes: peak anonymous memory above what the model
        occupies here, the interpreter with its libraries included.
    """
    groups.barrier("start")
    asked, disk, start = _proc("io", "rchar"), _proc("io", "read_bytes"), time.perf_counter()
    with PeakMemory() as peak:
        model = load(config)
        groups.barrier("loaded")
        seconds = time.perf_counter() - start
    held = [(getattr(p, "ds_tensor", p), p.requires_grad) for p in model.parameters()]
    resident = sum(part.numel() * part.element_size() for part, _ in held)
    return {
        "seconds": seconds,
        "held_bytes": sum(part.numel() * part.element_size() for part, trains in held if not trains),
        "asked_bytes": _proc("io", "rchar") - asked,
        "disk_bytes": _proc("io", "read_bytes") - disk,
        "excess_bytes": peak.bytes - resident,
    }


def _proc(file: str, field: str) -> int:
    lines = Path(f"/proc/self/{file}").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def main() -> None:
    model, contender, output = sys.argv[-3:]
    world = groups.read_world()
    groups.quiet_libraries()
    groups.initialize(world, timeout_minutes=10, tensor_parallel=world.size if contender == "comol_ds-tp" else 1)
    config = RunConfig(
        model=ModelSettings(model_name_or_path=model),
        adapter=AdapterSettings(r=8, num_experts=2, target_modules=["q_proj"]),
    )
    load = load_with_transformers if contender == "transformers" else load_with_comol_ds
    result = measure(load, config)
    (Path(output) / f"{world.rank}.json").write_text(json.dumps(result))
    groups.shut_down()


if __name__ == "__main__":
    main()
    groups.exit_process(0)
