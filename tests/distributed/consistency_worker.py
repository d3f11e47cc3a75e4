"""One rank of the consistency test: four ranks, TP2 x DP2. Writes what each check said in each situation.

Usage: deepspeed consistency_worker.py MODELS OUTPUT_FOLDER
"""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from comol_ds.parallel import groups
from comol_ds.parallel.consistency import check_same_batch, check_same_replicas
from comol_ds.training.router_load import RouterLoad
from tests.distributed.case_runner import build_case, run_steps
from tests.distributed.equality_cases import Case
from tests.tiny_models import random_batch

LAYER = "base_model.model.model.layers.1.mlp.down_proj"
REPLICATED, SHARDED = f"{LAYER}.comol_cores.default", f"{LAYER}.comol_A.default"


def message_of(check: Callable[[], None]) -> str | None:
    """What the check complains of; None if it is content."""
    try:
        check()
    except RuntimeError as error:
        return str(error)
    return None


def batches(situation: str, rank: int) -> list[dict]:
    """Two micro-batches; data-parallel peers have other records. One rank departs from the situation's usual."""
    first, second = random_batch(2, seed=rank // 2), random_batch(2, seed=10 + rank // 2)
    if situation == "other order of the keys" and rank == 1:
        second = dict(reversed(second.items()))
    if situation == "another token on rank 1" and rank == 1:
        second["input_ids"][1, 2] += 1
    if situation == "another record id on rank 3" and rank == 3:
        second["record_ids"][0] = "random:0:99"
    if situation == "another dtype on rank 0" and rank == 0:
        first["labels"] = first["labels"].int()
    if situation == "the first micro-batch only on ranks 1 and 3" and rank in (1, 3):
        return [first]
    return [first, second]


BATCHES = (
    "own records on data-parallel peers",
    "other order of the keys",
    "another token on rank 1",
    "another record id on rank 3",
    "another dtype on rank 0",
    "the first micro-batch only on ranks 1 and 3",
)


def check_replicas(case: Case, models: str, rank: int) -> dict[str, str | None]:
    """Train, then change what some ranks hold; every change is undone before the next."""
    assembled = build_case(case, models)
    model = assembled.engine.module
    run_steps(assembled, case, RouterLoad(model), range(case.steps))
    held = {name: getattr(p, "ds_tensor", p.data).view(-1) for name, p in model.named_parameters() if p.requires_grad}

    def changed(changes: list[tuple[int, str, int]]) -> str | None:
        mine = [(held[name], index) for where, name, index in changes if where == rank]
        before = [values[index].clone() for values, index in mine]
        for values, index in mine:
            values[index] = torch.nextafter(values[index], torch.tensor(math.inf))  # one ulp
        message = message_of(lambda: check_same_replicas(model, step=case.steps))
        for (values, index), value in zip(mine, before, strict=True):
            values[index] = value
        return message

    found = {
        "after training": changed([]),
        "replicated parameter, rank 3": changed([(3, REPLICATED, 0)]),
        "sharded parameter, rank 3": changed([(3, SHARDED, 0)]),
        "three replicated parameters, ranks 1 and 3": changed(
            [(where, REPLICATED.replace("cores", part), 0) for where in (1, 3) for part in ("cores", "router", "B")]
        ),
        "all undone": changed([]),
    }
    if case.ds_config == "zero3":  # 75 numbers in partitions of 38; of ranks 2 and 3, the last is padding
        found["behind the partition, rank 3"] = changed([(3, REPLICATED, 37)])
        found["the partition's last number, rank 3"] = changed([(3, REPLICATED, 36)])
    assembled.engine.destroy()
    return found


def main() -> None:
    models, output = sys.argv[-2:]
    world = groups.read_world()
    groups.initialize(world, timeout_minutes=1)
    groups.arrange(4)
    all_peers = [random_batch(2, seed=int(world.rank == 0))]
    found = {"batches": {"rank 0 alone among four": message_of(lambda: check_same_batch(all_peers, step=1))}}
    groups.arrange(2)
    for situation in BATCHES:
        mine = batches(situation, world.rank)
        found["batches"][situation] = message_of(lambda mine=mine: check_same_batch(mine, step=1))
    for name in ("zero0", "zero2", "zero3"):
        case = Case(name, 1, "sgd", "none", tensor_parallel=2, r=5, steps=2, global_batch=4)
        found[name] = check_replicas(case, models, world.rank)
    groups.arrange(1)
    if world.rank == 0:  # the others do not come
        found["alone"] = message_of(lambda: check_same_batch(batches(BATCHES[0], 0), step=1))
        found["alone"] = found["alone"] or message_of(lambda: check_same_replicas(torch.nn.Linear(2, 2), step=1))
    (Path(output) / f"rank_{world.rank}.json").write_text(json.dumps(found))
    groups.shut_down()


if __name__ == "__main__":
    main()
    groups.exit_process(0)
