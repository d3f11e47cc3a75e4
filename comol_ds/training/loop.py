"""The whole run, read top to bottom as a story of named steps."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from comol_ds.adapters.adapter_folder import write_adapter
from comol_ds.config import RunConfig
from comol_ds.data.batches import EvalBatches, TrainBatches, generation_batches
from comol_ds.data.prepare import PreparedData, prepare_data
from comol_ds.data.streaming import StreamingBatches
from comol_ds.parallel import groups
from comol_ds.parallel.assemble import Assembled, assemble, total_steps
from comol_ds.parallel.consistency import check_same_batch, check_same_replicas
from comol_ds.parallel.device import device
from comol_ds.parallel.zero_partition import gather_adapter
from comol_ds.training.checkpoint import load_checkpoint, peft_config, save_checkpoint
from comol_ds.training.describe import batches_line, describe_run, parameters_line, result_lines
from comol_ds.training.evaluation import Evaluation, evaluate
from comol_ds.training.metrics import Metrics
from comol_ds.training.plan import RunPlan, load_tokenizer, plan_run
from comol_ds.training.router_load import RouterLoad
from comol_ds.training.run_folder import append_json_line
from comol_ds.training.step import train_step


@dataclass
class Run:
    """What the steps of the story hand to each other."""

    plan: RunPlan
    tokenizer: PreTrainedTokenizerBase
    data: PreparedData
    batches: TrainBatches | StreamingBatches
    assembled: Assembled
    total_steps: int
    router_load: RouterLoad
    metrics: Metrics
    evaluations: list[Evaluation] = field(default_factory=list)

    @property
    def engine(self) -> Any:
        return self.assembled.engine

    @property
    def is_main(self) -> bool:
        return self.plan.world.rank == 0


def run(config: RunConfig, world: groups.World) -> None:
    """Train one adapter, from configuration to verified adapter folder.

    Args:
        config: settings with model_name_or_path and dataset filled in.
        world: this process among all.

    Raises:
        UserError: bad configuration or input, on every rank, before any trains.
    """
    groups.quiet_libraries()
    plan = plan_run(config, world)
    if config.run.dry_run:
        if world.rank == 0:
            print(describe_run(plan))
        return
    groups.initialize(world, config.run.collective_timeout_minutes, plan.grid.tensor_parallel)
    try:
        state = set_up(plan)
        if config.run.eval_on_start and plan.start_step == 0:
            evaluate_now(state, step=0)
        train(state)
        evaluate_now(state, step=state.total_steps)
        write_final_adapter(state)
        say(plan, *result_lines(plan, state.evaluations))
    finally:
        groups.shut_down()


def set_up(plan: RunPlan) -> Run:
    """Data, model, engine and run folder; continues a checkpoint if the plan found one."""
    config, world = plan.config, plan.world
    say(plan, *plan.passed_over, batches_line(plan), parameters_line(plan))
    tokenizer = load_tokenizer(config.model.tokenizer_path)
    data = groups.first_on_each_node(
        world, "prepare the data", lambda: prepare_data(config.data, tokenizer, config.run.seed)
    )
    say(plan, data.report.summary())
    batches = train_batches(plan, data, tokenizer.pad_token_id)
    steps = total_steps(config.optimizer, batches.steps_per_epoch)
    assembled = assemble(config, config.model.model_name_or_path, plan.ds_config, steps, config.model.bf16)
    if plan.checkpoint is not None:
        load_checkpoint(assembled.engine, plan.checkpoint, world)
        nothing_left = ", no step left to train" if plan.start_step >= steps else ""
        say(plan, f"resumed from {plan.checkpoint}: step {plan.start_step} of {steps}{nothing_left}")
    elif config.run.resume_from_checkpoint:
        say(plan, f"no checkpoint in {plan.folder.checkpoints} yet: starting from step 0")
    groups.together("prepare the run folder", lambda: prepare_folder(plan))
    router_load = RouterLoad(assembled.engine.module)
    return Run(plan, tokenizer, data, batches, assembled, steps, router_load, Metrics(plan))


def prepare_folder(plan: RunPlan) -> None:
    """Rank 0 creates the run folder and writes the resolved configuration."""
    if plan.world.rank == 0:
        plan.folder.prepare(plan.config, plan.ds_config, plan.start_step)


def train(state: Run) -> None:
    """Optimizer steps from the plan's start to the end, with logging, evaluation and checkpoints on the way."""
    plan, settings, last = state.plan, state.plan.config.run, state.total_steps
    where = device()
    progress = tqdm(total=last, initial=plan.start_step, disable=not state.is_main, unit="step")
    for step, micro_batches in steps_from(state.batches, plan.start_step, last):
        if step == plan.start_step + 1 or step % plan.config.parallel.consistency_check_steps == 0:
            check_same_batch(micro_batches, step)
            check_same_replicas(state.engine.module, step)
        result = train_step(state.assembled, micro_batches, state.router_load, where, step)
        state.metrics.add(result)
        progress.update()
        if step % settings.logging_steps == 0 or step == last:
            line = state.metrics.log(step, state.engine.get_lr()[0])
            progress.set_postfix_str(f"loss {line['loss']:.4f}, {line['tokens_per_second']:.0f} tokens/s")
            log_router_load(state, step)
        if settings.eval_steps and step % settings.eval_steps == 0 and step != last:
            evaluate_now(state, step)
        if step % settings.save_steps == 0 or step == last:
            folder, limit = plan.folder.checkpoints, settings.save_total_limit
            save_checkpoint(state.engine, folder, step, plan.identity, plan.world, limit)
    progress.close()


def steps_from(
    batches: TrainBatches | StreamingBatches, start: int, last: int
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """This rank's micro-batches of the steps start+1 .. last, each with its number, epoch after epoch."""
    step = start
    epoch, done_in_epoch = batches.locate(start)
    while step < last:
        for micro_batches in batches.epoch(epoch, done_in_epoch):
            step += 1
            yield step, micro_batches
            if step == last:
                return
        epoch, done_in_epoch = epoch + 1, 0


def train_batches(plan: RunPlan, data: PreparedData, pad_token_id: int) -> TrainBatches | StreamingBatches:
    """This rank's share of every global batch."""
    settings = plan.config.data
    share = {
        "layout": plan.batches,
        "dp_rank": plan.grid.dp_rank,
        "seed": plan.config.run.seed,
        "packing": settings.packing,
        "max_length": settings.max_length,
        "pad_token_id": pad_token_id,
    }
    if settings.streaming:
        return StreamingBatches(data.train, **share)
    return TrainBatches(data.train, group_by_length=settings.group_by_length, **share)


def evaluate_now(state: Run, step: int) -> None:
    """Score the validation records and log the result."""
    settings, grid, records = state.plan.config, state.plan.grid, state.data.validation
    size = settings.optimizer.per_device_eval_batch_size
    pad = state.tokenizer.pad_token_id
    prompts = generation_batches(
        records, size, grid.dp_rank, grid.data_parallel, pad, settings.run.max_generate_records
    )
    evaluation = evaluate(
        state.assembled,
        sorted(set(records["task"])),
        EvalBatches(records, size, grid.dp_rank, grid.data_parallel, pad),
        prompts,
        state.tokenizer,
        settings.run.max_new_tokens,
        device(),
    )
    state.evaluations.append(evaluation)
    state.metrics.log_evaluation(step, evaluation)


def log_router_load(state: Run, step: int) -> None:
    """One line of router_load.jsonl. A collective call."""
    load = state.router_load.pop()
    if state.is_main and load is not None:
        append_json_line(state.plan.folder.router_load, {"step": step, **load})


def write_final_adapter(state: Run) -> None:
    """The adapter folder: whole, finite, and read back before the run says done."""
    adapter = gather_adapter(state.engine)

    def write() -> None:
        if state.is_main:
            write_adapter(adapter, peft_config(state.engine), state.plan.folder.adapter)

    groups.together("write the final adapter", write)


def say(plan: RunPlan, *lines: str) -> None:
    """Print on rank 0."""
    if plan.world.rank == 0:
        for line in lines:
            print(line, flush=True)
