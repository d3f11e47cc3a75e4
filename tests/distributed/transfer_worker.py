"""One rank of the adapter transfer test: under TP2 x DP2 and ZeRO-3 adapters are saved, and others start the training.

Usage: deepspeed transfer_worker.py MODELS OUTPUT_FOLDER
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from comol_ds.adapters.adapter_folder import write_adapter
from comol_ds.parallel import groups
from comol_ds.parallel.assemble import Assembled, assemble
from comol_ds.parallel.zero_partition import gather_adapter
from comol_ds.training.checkpoint import peft_config
from comol_ds.training.router_load import RouterLoad
from tests.distributed.case_runner import resolve_case, run_steps
from tests.distributed.equality_cases import variation
from tests.tiny_models import random_batch

ROUTERS = ("core", "input")


def logits_of(assembled: Assembled) -> torch.Tensor:
    """Whole logits of one batch."""
    batch = random_batch(4, seed=99)
    assembled.engine.eval()
    with torch.no_grad(), assembled.vocabulary.whole_logits():
        return assembled.engine(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits


def build(router: str, models: str, start: str | None) -> Assembled:
    case = variation(router=router)
    config, ds_config = resolve_case(case, models)
    config = dataclasses.replace(config, adapter=dataclasses.replace(config.adapter, adapter_name_or_path=start))
    return assemble(config, config.model.model_name_or_path, ds_config, case.steps, bf16=False)


def save(assembled: Assembled, folder: Path, rank: int) -> None:
    adapter = gather_adapter(assembled.engine)
    if rank == 0:
        write_adapter(adapter, peft_config(assembled.engine), folder)


def main() -> None:
    models, output = sys.argv[-2], Path(sys.argv[-1])
    world = groups.read_world()
    groups.initialize(world, timeout_minutes=2, tensor_parallel=2)
    logits = {}
    for router in ROUTERS:
        trained = build(router, models, start=None)
        trained.engine.train()
        run_steps(trained, variation(router=router), RouterLoad(trained.engine.module), range(3))
        logits[f"saved_{router}"] = logits_of(trained)
        save(trained, output / f"saved_{router}", world.rank)
        del trained
        started = build(router, models, start=str(output / f"given_{router}"))
        logits[f"given_{router}"] = logits_of(started)
        save(started, output / f"again_{router}", world.rank)
        del started
    if world.rank == 0:
        torch.save(logits, output / "logits.pt")
    groups.shut_down()


if __name__ == "__main__":
    main()
    groups.exit_process(0)
