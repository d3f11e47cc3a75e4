"""Runs that go from one layout to another in the middle: what is trained, on each leg and in one plain process."""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from datasets import Dataset
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM

from comol_ds.data.batches import TrainBatches
from comol_ds.data.tokenization import IGNORED
from comol_ds.layout import BatchLayout
from comol_ds.parallel import groups
from comol_ds.parallel.assemble import attach_adapter, build_optimizer, build_schedule
from comol_ds.parallel.device import device
from comol_ds.parallel.training_state import STEP, VALUES
from comol_ds.parallel.zero_partition import adapter_state_dict, gather_adapter
from comol_ds.training.checkpoint import CheckpointWriter, load_checkpoint
from comol_ds.training.identity import RunIdentity
from comol_ds.training.loop import steps_from
from comol_ds.training.resume import find_checkpoint, read_checkpoint
from comol_ds.training.router_load import RouterLoad
from comol_ds.training.run_folder import RunFolder
from comol_ds.training.step import train_step
from tests.distributed.case_runner import build_case
from tests.distributed.equality_cases import Case
from tests.distributed.stored_state import assert_holds_what_is_stored
from tests.tiny_models import VOCABULARY

SEED, MICRO, GLOBAL_BATCH = 7, 2, 12
# 28 records are 2 steps an epoch, with 4 left out: the change comes in the middle of the second epoch
RECORDS, STEPS, CHANGE = 28, 8, 3


@dataclass(frozen=True)
class Layout:
    """Ranks, how many of them share one copy of the model, and a DeepSpeed JSON."""

    ranks: int
    tensor_parallel: int
    ds_config: str

    @property
    def batches(self) -> BatchLayout:
        data_parallel = self.ranks // self.tensor_parallel
        return BatchLayout(data_parallel, MICRO, GLOBAL_BATCH // MICRO // data_parallel)


@dataclass(frozen=True)
class Journey:
    """One run on two layouts, one after the other."""

    first: Layout
    then: Layout
    optim: str
    train_head: bool = False

    @property
    def name(self) -> str:
        legs = [f"{leg.ranks}.{leg.tensor_parallel}.{leg.ds_config}" for leg in (self.first, self.then)]
        return "-".join([*legs, self.optim, *["head"] * self.train_head])

    def case(self, layout: Layout) -> Case:
        return Case(
            layout.ds_config,
            layout.batches.accumulation,
            self.optim,
            "none",
            tensor_parallel=layout.tensor_parallel,
            train_head=self.train_head,
            r=5,
            steps=STEPS,
            global_batch=GLOBAL_BATCH,
        )


def _journeys(first: Layout, then: Layout, **changes: bool) -> list[Journey]:
    return [Journey(first, then, optim, **changes) for optim in ("adamw_torch", "sgd")]


GATE = Journey(Layout(2, 1, "zero3"), Layout(2, 2, "zero1"), "adamw_torch")
JOURNEYS = [
    *_journeys(Layout(2, 1, "zero2"), Layout(1, 1, "zero1"), train_head=True),
    *_journeys(Layout(2, 1, "zero3"), Layout(2, 2, "zero3")),
    Journey(Layout(2, 2, "zero0"), Layout(2, 1, "zero3_offload"), "adamw_torch"),
    Journey(Layout(2, 1, "zero1"), Layout(2, 2, "zero0"), "sgd"),
    *_journeys(Layout(4, 2, "zero3"), Layout(2, 1, "zero2")),
    *_journeys(Layout(3, 1, "zero3"), Layout(2, 1, "zero3")),
]


def records() -> Dataset:
    """Random token sequences of different lengths, the first third of each without a label."""
    generator = torch.Generator().manual_seed(SEED)
    rows = []
    for number in range(RECORDS):
        ids = torch.randint(3, VOCABULARY, (6 + number * 5 % 19,), generator=generator).tolist()
        labels = [IGNORED] * (len(ids) // 3) + ids[len(ids) // 3 :]
        rows.append({"record_id": f"x:{number}", "task": "t", "input_ids": ids, "labels": labels, "length": len(ids)})
    return Dataset.from_list(rows)


def train_batches(layout: BatchLayout, dp_rank: int) -> TrainBatches:
    return TrainBatches(
        records(), layout, dp_rank, SEED, packing=False, group_by_length=False, max_length=32, pad_token_id=0
    )


def train_leg(journey: Journey, layout: Layout, models: str, folder: Path) -> dict:
    """One leg on the ranks of this world, from the start or the newest checkpoint to the next one. A collective call.

    Returns:
        losses, norms, rates and sorted record ids of the leg's steps; the weights after it.
    """
    groups.arrange(layout.tensor_parallel)
    world, grid = groups.read_world(), groups.mesh().grid
    assembled = build_case(journey.case(layout), models)
    engine = assembled.engine
    stage = engine.zero_optimization_stage()
    identity = RunIdentity(
        world.size, layout.tensor_parallel, stage, False, GLOBAL_BATCH, MICRO, SEED, journey.optim, models, {}, {}
    )
    run_folder = RunFolder(str(folder))
    writer = CheckpointWriter(run_folder.checkpoints, run_folder.generations, identity, world, None, 60)
    checkpoint, _ = find_checkpoint("latest", run_folder.checkpoints)
    start, stop = 0, CHANGE
    if checkpoint is not None:
        resume = read_checkpoint(checkpoint, identity, run_folder)
        assert resume.difference.moved, "this test is about the other route"
        load_checkpoint(assembled, resume, identity, world)
        assert_holds_what_is_stored(engine, resume.path)
        start, stop = resume.step, STEPS
    load, outcome = RouterLoad(engine.module), {"losses": [], "norms": [], "rates": [], "records": []}
    for step, batches in steps_from(train_batches(layout.batches, grid.dp_rank), start, stop):
        outcome["rates"].append(engine.get_lr()[0])
        result = train_step(assembled, batches, load, device(), step)
        outcome["losses"].append(result.loss_sum / result.targets)
        outcome["norms"].append(result.grad_norm)
        mine = [record for batch in batches for record in batch["record_ids"]]
        seen = groups.gather_objects(mine if grid.tp_rank == 0 else [], "compare the records")
        outcome["records"].append(sorted(record for ranks in seen for record in ranks))
    writer.save(assembled, stop)
    writer.finish()
    outcome["weights"] = gather_adapter(engine)
    engine.destroy()
    return outcome


def uninterrupted(journey: Journey, models: str) -> dict:
    """The literal loop in one plain PyTorch process over all steps: no DeepSpeed, no accumulation, no checkpoint."""
    config = journey.case(Layout(1, 1, "zero3")).run_config(models)
    base = AutoModelForCausalLM.from_pretrained(config.model.model_name_or_path, dtype=torch.float32)
    model = attach_adapter(base, config.adapter, config.run.seed)
    optimizer = build_optimizer(model, config.optimizer)
    schedule = build_schedule(optimizer, config.optimizer, STEPS)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    outcome = {"losses": [], "norms": [], "rates": [], "records": []}
    batches = train_batches(BatchLayout(1, GLOBAL_BATCH, 1), 0)
    for _, (batch,) in islice(steps_from(batches, 0, STEPS), STEPS):
        outcome["rates"].append(schedule.get_last_lr()[0])
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        loss.backward()
        outcome["norms"].append(float(clip_grad_norm_(trained.values(), config.optimizer.max_grad_norm)))
        outcome["losses"].append(loss.item())
        outcome["records"].append(sorted(batch["record_ids"]))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    values = {name: p.detach() for name, p in trained.items()}
    outcome["weights"] = adapter_state_dict(model, values)
    state = {name: {VALUES: values[name], **optimizer.state[p]} for name, p in trained.items()}
    outcome["state"] = {
        f"{kind}:{name}": torch.as_tensor(tensor, dtype=torch.float32)
        for name, kept in state.items()
        for kind, tensor in kept.items()
    }
    assert journey.optim == "sgd" or any(key.startswith(f"{STEP}:") for key in outcome["state"])
    return outcome
