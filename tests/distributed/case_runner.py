"""What the worker scripts share: one case's engine, and its steps on this rank's share of the batches."""

import dataclasses
from pathlib import Path
from typing import Any

from comol_ds.ds_config import load_ds_json, resolve_ds_config
from comol_ds.layout import plan_batches
from comol_ds.parallel.assemble import Assembled, assemble
from comol_ds.parallel.device import device
from comol_ds.parallel.groups import World
from comol_ds.training.router_load import RouterLoad
from comol_ds.training.step import StepResult, train_step
from tests.distributed.equality_cases import GLOBAL_BATCH, STEPS, Case
from tests.tiny_models import random_batch, slice_batch

REPOSITORY = Path(__file__).resolve().parents[2]


def resolve_case(case: Case, models: str, world: World) -> tuple[Any, dict[str, Any]]:
    """The run configuration and the resolved DeepSpeed dictionary of a case at this world size."""
    micro = GLOBAL_BATCH // world.size // case.accumulation
    config = case.run_config(models)
    config = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, per_device_train_batch_size=micro)
    )
    batches = plan_batches(world.size, micro, GLOBAL_BATCH)
    template = load_ds_json(str(REPOSITORY / config.run.ds_config))
    return config, resolve_ds_config(template, config, batches, case.bf16)


def build_case(case: Case, models: str, world: World) -> Assembled:
    """The engine of a case, in training mode."""
    config, ds_config = resolve_case(case, models, world)
    assembled = assemble(config, config.model.model_name_or_path, ds_config, STEPS, case.bf16)
    assembled.engine.train()
    return assembled


def run_steps(engine: Any, case: Case, world: World, load: RouterLoad, steps: range) -> list[StepResult]:
    """Train ``steps``; step s works on the random global batch of seed s."""
    micro = GLOBAL_BATCH // world.size // case.accumulation
    first = world.rank * micro * case.accumulation
    results = []
    for step in steps:
        whole = random_batch(GLOBAL_BATCH, seed=step)
        mine = [slice_batch(whole, slice(first + i * micro, first + (i + 1) * micro)) for i in range(case.accumulation)]
        results.append(train_step(engine, mine, load, world.size, device(), step + 1))
    return results
