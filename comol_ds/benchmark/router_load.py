"""What router statistics cost: whole training steps with and without them, taking turns in one process.

The contenders, on the same model and batch, under DeepSpeed ZeRO-3 in a world of one:
    off      no hook
    on       gates are counted
    logged   a logging step: updates and cores are measured too, and the sums are read
"""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig

from comol_ds.benchmark.figures import in_turns, median_ratio, sizes, spread
from comol_ds.benchmark.processes import REPOSITORY
from comol_ds.config import AdapterSettings, ModelSettings, OptimizerSettings, RouterSettings, RunConfig, RunSettings
from comol_ds.data.collate import padded_batch
from comol_ds.ds_config import load_ds_json, resolve_ds_config
from comol_ds.layout import plan_batches
from comol_ds.parallel import groups
from comol_ds.parallel.assemble import Assembled, assemble
from comol_ds.parallel.device import device
from comol_ds.training.router_load import RouterLoad
from comol_ds.training.step import train_step

CONTENDERS = ("off", "on", "logged")
TASKS = ("first", "second", "third", "fourth")


@dataclass(frozen=True)
class RouterLoadCase:
    """A random Llama of ``layers`` decoder layers in ``folder``, and a batch of 4 rows of ``tokens`` / 4."""

    folder: Path
    hidden: int = 1024
    layers: int = 4
    tokens: int = 1024
    num_experts: int = 8
    r: int = 16


def measure_router_load(case: RouterLoadCase, rounds: int, logging_steps: int = 10) -> dict:
    """Time ``rounds`` steps of every contender, after 2 for warming up.

    Returns:
        A dictionary that can be written as JSON; ratios are medians over the rounds of contender / off; ``amortized``
        is the mean over ``logging_steps`` steps, the last of which is logged.
    """
    groups.quiet_libraries()
    groups.initialize(groups.World(0, 1, 0), timeout_minutes=10)
    try:
        assembled = _assemble(case)
        batch = _batch(case)
        seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        for name, counts in in_turns(CONTENDERS, rounds, warmup=2):
            taken = _timed_step(assembled, batch, name)
            if counts:
                seconds[name].append(taken)
    finally:
        groups.shut_down()
    ratios = {name: median_ratio(values, seconds["off"]) for name, values in seconds.items()}
    amortized = (ratios["on"] * (logging_steps - 1) + ratios["logged"]) / logging_steps
    return {
        "case": sizes(case),
        "rounds": rounds,
        "logging_steps": logging_steps,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "ratio_to_off": ratios | {"amortized": amortized},
    }


def table(result: dict) -> str:
    """The result as text, one line per contender."""
    case = result["case"]
    lines = [
        f"hidden {case['hidden']}, {case['layers']} layers, {case['tokens']} tokens, E={case['num_experts']},"
        f" {len(TASKS)} tasks; {result['rounds']} rounds",
        f"{'statistics':12}{'seconds':>9}{'min':>8}{'max':>8}{'/ off':>8}",
    ]
    lines += [
        f"{name:12}{taken['median']:9.3f}{taken['minimum']:8.3f}{taken['maximum']:8.3f}"
        f"{result['ratio_to_off'][name]:8.3f}"
        for name, taken in result["seconds"].items()
    ]
    every = result["logging_steps"]
    return "\n".join([*lines, f"one step in {every} logged: {result['ratio_to_off']['amortized']:.4f} of off"])


def _assemble(case: RouterLoadCase) -> Assembled:
    LlamaConfig(
        vocab_size=8192, hidden_size=case.hidden, intermediate_size=3 * case.hidden, num_attention_heads=8,
        num_key_value_heads=8, num_hidden_layers=case.layers,
    ).save_pretrained(case.folder)  # fmt: skip
    config = RunConfig(
        model=ModelSettings(model_name_or_path=str(case.folder), init_random=True),
        adapter=AdapterSettings(r=case.r, num_experts=case.num_experts),
        optimizer=OptimizerSettings(per_device_train_batch_size=4),
        run=RunSettings(ds_config=str(REPOSITORY / "ds_configs" / "zero3.json")),
    )
    bf16 = torch.cuda.is_available()
    ds_config = resolve_ds_config(load_ds_json(config.run.ds_config), config, plan_batches(1, 4, 4), bf16)
    assembled = assemble(config, str(case.folder), ds_config, 1000, bf16)
    assembled.engine.train()
    return assembled


def _batch(case: RouterLoadCase) -> dict:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 8192, (4, case.tokens // 4), generator=generator).tolist()
    records = [
        {"input_ids": ids, "labels": ids, "record_id": task, "task": task}
        for ids, task in zip(rows, TASKS, strict=True)
    ]
    return padded_batch(records, pad_token_id=0)


def _timed_step(assembled: Assembled, batch: dict, contender: str) -> float:
    settings = dataclasses.replace(RouterSettings(), router_load=contender != "off")
    load = RouterLoad(assembled.engine.module, settings, TASKS)
    where = device()
    _wait()
    start = time.perf_counter()
    train_step(assembled, [batch], load, where, 1, detail=contender == "logged")
    if contender == "logged":
        load.pop()
    _wait()
    taken = time.perf_counter() - start
    load.close()
    return taken


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
