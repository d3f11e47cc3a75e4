"""One rank of the equality test: trains every case in turn and saves what rank 0 sees.

Usage: deepspeed equality_worker.py MODELS OUTPUT_FOLDER
"""

import dataclasses
import sys
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(Path(__file__).parent)]

from equality_cases import BF16_CASES, CASES, GLOBAL_BATCH, STEPS, Case  # noqa: E402

from comol_ds.ds_config import load_ds_json, resolve_ds_config  # noqa: E402
from comol_ds.layout import plan_batches  # noqa: E402
from comol_ds.parallel import groups  # noqa: E402
from comol_ds.parallel.assemble import assemble  # noqa: E402
from comol_ds.parallel.device import device  # noqa: E402
from comol_ds.parallel.zero_partition import gather_adapter  # noqa: E402
from comol_ds.training.router_load import RouterLoad  # noqa: E402
from comol_ds.training.step import train_step  # noqa: E402
from tests.tiny_models import random_batch, slice_batch  # noqa: E402


def train(case: Case, models: str, world: groups.World) -> dict:
    config = case.run_config(models)
    micro = GLOBAL_BATCH // world.size // case.accumulation
    batches = plan_batches(world.size, micro, GLOBAL_BATCH)
    config = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, per_device_train_batch_size=micro)
    )
    ds_config = resolve_ds_config(load_ds_json(str(REPOSITORY / config.run.ds_config)), config, batches, case.bf16)
    assembled = assemble(config, config.model.model_name_or_path, ds_config, STEPS, case.bf16)
    engine = assembled.engine
    engine.train()
    router_load = RouterLoad(engine.module)
    losses, norms = [], []
    for step in range(STEPS):
        whole = random_batch(GLOBAL_BATCH, seed=step)
        first = world.rank * micro * case.accumulation
        mine = [slice_batch(whole, slice(first + i * micro, first + (i + 1) * micro)) for i in range(case.accumulation)]
        result = train_step(engine, mine, router_load, world.size, device(), step + 1)
        losses.append(result.loss_sum / result.targets)
        norms.append(result.grad_norm)
    outcome = {"losses": losses, "norms": norms, "load": router_load.pop(), "weights": gather_adapter(engine)}
    engine.destroy()
    return outcome


def main() -> None:
    models, output = sys.argv[-2:]
    world = groups.read_world()
    groups.initialize(world, timeout_minutes=2)
    for case in CASES + BF16_CASES:
        outcome = train(case, models, world)
        if world.rank == 0:
            torch.save(outcome, Path(output) / f"{case.name}.pt")
    groups.shut_down()


if __name__ == "__main__":
    main()
