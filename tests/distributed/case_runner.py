"""What the worker scripts share: one case's engine, and its steps on this rank's share of the batches."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from comol_ds.config import RouterSettings
from comol_ds.ds_config import load_ds_json, resolve_ds_config
from comol_ds.layout import plan_batches
from comol_ds.parallel import groups
from comol_ds.parallel.assemble import Assembled, assemble
from comol_ds.parallel.device import device
from comol_ds.parallel.zero_partition import gather_adapter
from comol_ds.training.router_load import RouterLoad
from comol_ds.training.step import StepResult, train_step
from tests.distributed.equality_cases import TASKS, Case
from tests.tiny_models import slice_batch

REPOSITORY = Path(__file__).resolve().parents[2]


def resolve_case(case: Case, models: str) -> tuple[Any, dict[str, Any]]:
    """The run configuration and the resolved DeepSpeed dictionary of a case on the arranged mesh."""
    micro = case.global_batch // groups.mesh().grid.data_parallel // case.accumulation
    config = case.run_config(models)
    config = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, per_device_train_batch_size=micro)
    )
    batches = plan_batches(groups.mesh().grid.data_parallel, micro, case.global_batch)
    template = load_ds_json(str(REPOSITORY / config.run.ds_config))
    return config, resolve_ds_config(template, config, batches, case.bf16)


def build_case(case: Case, models: str) -> Assembled:
    """Everything a step of the case needs, in training mode."""
    config, ds_config = resolve_case(case, models)
    assembled = assemble(config, config.model.model_name_or_path, ds_config, case.steps, case.bf16)
    assembled.engine.train()
    return assembled


def run_steps(assembled: Assembled, case: Case, load: RouterLoad, steps: range) -> list[StepResult]:
    """Train ``steps``, the case's last one counted with detail; step s works on the random global batch of seed s."""
    grid = groups.mesh().grid
    micro = case.global_batch // grid.data_parallel // case.accumulation
    first = grid.dp_rank * micro * case.accumulation
    results = []
    for step in steps:
        whole = case.batch(step)
        mine = [slice_batch(whole, slice(first + i * micro, first + (i + 1) * micro)) for i in range(case.accumulation)]
        detail = step + 1 == case.steps
        results.append(train_step(assembled, mine, load, device(), step + 1, detail))
    return results


def run_worker(jobs: Iterable[tuple[str, Case, Callable[[], dict]]], output: str, timeout_minutes: float = 2) -> None:
    """A worker's whole run: trains every job on its mesh in turn, and rank 0 saves what it sees.

    Args:
        jobs: name of the file, the case whose mesh it needs, and what trains it.
        output: folder for NAME.pt.
        timeout_minutes: of a collective.
    """
    world = groups.read_world()
    groups.initialize(world, timeout_minutes=timeout_minutes)
    for name, case, train in jobs:
        groups.arrange(case.tensor_parallel)
        outcome = train()
        if world.rank == 0:
            torch.save(outcome, Path(output) / f"{name}.pt")
    groups.shut_down()


def train_case(
    case: Case,
    models: str,
    prepare: Callable[[Assembled], None] = lambda assembled: None,
    router: RouterSettings | None = None,
) -> dict:
    """Train a case from start to end: what the equality tests compare.

    Args:
        case: what to train.
        models: folder with one model folder per family.
        prepare: called with what was built, before the first step.
        router: whether the routers are counted, by default they are.
    """
    assembled = build_case(case, models)
    prepare(assembled)
    load = RouterLoad(assembled.engine.module, router, tasks=TASKS)
    results = run_steps(assembled, case, load, range(case.steps))
    outcome = {
        "losses": [result.loss_sum / result.targets for result in results],
        "norms": [result.grad_norm for result in results],
        "router_losses": [result.router_losses for result in results],
        "load": load.pop(),
        "weights": gather_adapter(assembled.engine),
    }
    assembled.engine.destroy()
    return outcome
