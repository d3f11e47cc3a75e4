"""One of two ranks of the activation tests: trains a suite, measures partitioned inputs, splits the loss.

Usage: deepspeed activation_worker.py SUITE MODELS OUTPUT_FOLDER
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from comol_ds.layout import shard_of
from comol_ds.parallel import activations, cross_entropy, groups
from comol_ds.parallel.device import device
from comol_ds.training.router_load import RouterLoad
from comol_ds.training.step import train_step
from tests.distributed.case_runner import build_case, train_case
from tests.distributed.equality_cases import BESIDE_NOTHING, SUITES, Case, variation
from tests.kept_tensors import MadeTensors, total_bytes
from tests.tiny_models import random_batch

ROWS, VOCABULARY = 9, 11  # not divisible by two ranks


def kept_bytes(models: str, checkpointing: str, partition: bool) -> int:
    """Bytes alive after a forward pass over 4 records on this rank."""
    case = variation(ds_config="zero0", checkpointing=checkpointing, partition=partition)
    assembled = build_case(case, models)
    batch = random_batch(4, seed=0)
    with MadeTensors() as made:
        logits = assembled.engine(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits
    assert logits.requires_grad
    return total_bytes(made.alive())


def step_beside_nothing(case: Case, models: str) -> tuple[float, float]:
    """Loss sum and gradient norm of a step in which one micro-batch of data-parallel rank 0 alone has any label."""
    assembled = build_case(case, models)
    labelled, unlabelled = random_batch(2, seed=1), random_batch(2, seed=2)
    unlabelled["labels"].fill_(-100)
    first = labelled if groups.mesh().grid.dp_rank == 0 else unlabelled
    result = train_step(assembled, [first, unlabelled], RouterLoad(assembled.engine.module), device(), 1)
    assembled.engine.destroy()
    return result.loss_sum, result.grad_norm


def split_loss(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Loss and gradient of logits split over the two ranks in chunks of 2 rows, and of the same logits in one piece."""
    generator = torch.Generator().manual_seed(4)
    whole = (torch.randn(ROWS, VOCABULARY, generator=generator, dtype=torch.float64) * 4).to(dtype)
    targets = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    targets[3], targets[5] = -100, VOCABULARY  # ignored, outside the vocabulary
    weights = torch.rand(ROWS, generator=generator, dtype=torch.float64).to(torch.promote_types(dtype, torch.float32))
    mesh = groups.mesh()
    shard = shard_of(VOCABULARY, 1, 2, mesh.grid.tp_rank)
    cross_entropy.CHUNK_ELEMENTS = 2 * (shard.stop - shard.start)
    mine = whole[:, shard.start : shard.stop].clone().requires_grad_()
    found = cross_entropy.cross_entropy(mine * 1, targets, -100, shard.start, VOCABULARY, mesh.tensor_group)
    (found.nan_to_num() * weights).sum().backward()
    gradient = torch.zeros(ROWS, VOCABULARY, dtype=torch.float64)
    gradient[:, shard.start : shard.stop] = mine.grad.double()
    dist.all_reduce(gradient)

    in_one = whole.to(weights.dtype).requires_grad_()
    targets[5] = -100
    expected = F.cross_entropy(in_one, targets, ignore_index=-100, reduction="none")
    (expected * weights).sum().backward()
    return {"found": found, "gradient": gradient.to(dtype), "expected": expected, "expected_gradient": in_one.grad}


def main() -> None:
    suite, models, output = sys.argv[-3:]
    world = groups.read_world()
    groups.initialize(world, timeout_minutes=2)
    activations.MIN_OFFLOADED_BYTES = 1  # in a tiny model all tensors are small
    tasks = [(case, train_case) for case in SUITES[suite]] + [(case, step_beside_nothing) for case in BESIDE_NOTHING]
    # in one process DeepSpeed goes from tensor-parallel size 1 to 2, but not back
    for case, task in sorted(tasks, key=lambda pair: pair[0].tensor_parallel):
        groups.arrange(case.tensor_parallel)
        outcome = task(case, models)
        if world.rank == 0:
            torch.save(outcome, Path(output) / f"{case.name}.pt")
    losses = {str(dtype): split_loss(dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)}
    modes = {"none": ("none", False), "full": ("full", False), "partitioned": ("full", True)}
    kept = {name: kept_bytes(models, *mode) for name, mode in modes.items()}
    torch.save({"losses": losses, "kept": kept}, Path(output) / f"measured_{world.rank}.pt")
    groups.shut_down()


if __name__ == "__main__":
    main()
    groups.exit_process(0)
