"""The whole run, read top to bottom as a story of named steps."""

from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from comol_ds.adapters.adapter_folder import write_adapter
from comol_ds.config import RunConfig
from comol_ds.data.batches import EvalBatches, TrainBatches, generation_batches
from comol_ds.data.streaming import StreamingBatches
from comol_ds.evaluation.answers import ExactMatch
from comol_ds.parallel import groups
from comol_ds.parallel.consistency import check_same_batch, check_same_replicas
from comol_ds.parallel.device import device
from comol_ds.parallel.watchdog import Watchdog
from comol_ds.parallel.zero_partition import gather_adapter
from comol_ds.router_load.counting import VALIDATION
from comol_ds.training.checkpoint import peft_config
from comol_ds.training.describe import describe_run, result_lines
from comol_ds.training.evaluation import evaluate
from comol_ds.training.plan import plan_run
from comol_ds.training.preemption import StopRequests
from comol_ds.training.set_up import Run, say, set_up
from comol_ds.training.step import train_step


def run(config: RunConfig, world: groups.World) -> bool:
    """Train one adapter, from configuration to verified adapter folder.

    Args:
        config: settings with model_name_or_path and dataset filled in.
        world: this process among all.

    Returns:
        whether the run is done; if not, it was asked to stop, has saved, and is to be started again.

    Raises:
        UserError: bad configuration or input, on every rank, before any trains.
    """
    groups.quiet_libraries()
    plan = plan_run(config, world)
    if config.run.dry_run:
        if world.rank == 0:
            print(describe_run(plan))
        return True
    with StopRequests(plan.folder.path, plan.folder.checkpoints, config.run, world) as requests:
        groups.initialize(world, config.run.collective_timeout_minutes, plan.grid.tensor_parallel)
        try:
            state = set_up(plan, requests)
            return state is None or run_all(state)
        finally:
            groups.shut_down()


def run_all(state: Run) -> bool:
    """From the first step to the adapter folder; False if the run was asked to stop before its last step was done."""
    if state.plan.start_step < state.total_steps and came_before_training(state):
        return False
    if owes_evaluation(state):
        evaluate_now(state, state.plan.start_step)
    try:
        if not train(state):
            return False
    except BaseException:
        state.checkpoints.land()
        raise
    state.requests.forget_file()
    if state.plan.start_step < state.total_steps or not evaluated_before(state):
        evaluate_now(state, step=state.total_steps)
    write_final_adapter(state)
    say(state.plan, *result_lines(state.plan, state.evaluations))
    return True


def came_before_training(state: Run) -> bool:
    """Whether the run was asked to stop while it was set up. A collective call."""
    plan = state.plan
    state.requests.came()
    reason = state.requests.agreed_reason()
    if reason is not None:
        left = "nothing was trained" if plan.resume is None else f"{plan.resume.path} is still the last checkpoint"
        state.requests.leave(f"stopped before a step: {reason}; {left}")
    return reason is not None


def owes_evaluation(state: Run) -> bool:
    """Whether the first thing to do is an evaluation: before the first step if the user wants it, or the one that a
    run left out because it was asked to stop after this step. A collective call."""
    settings, step = state.plan.config.run, state.plan.start_step
    if step == 0:
        return settings.eval_on_start
    is_due = bool(settings.eval_steps) and step % settings.eval_steps == 0 and step < state.total_steps
    return is_due and not evaluated_before(state)


def evaluated_before(state: Run) -> bool:
    """Whether the checkpoint that the run continues was evaluated. A collective call."""
    found = state.plan.folder.was_evaluated(state.plan.start_step)
    return groups.gather_objects(found, "see what was evaluated")[0]


def train(state: Run) -> bool:
    """Optimizer steps from the plan's start to the end, with logging, evaluation and checkpoints on the way.

    Returns:
        whether the last step was done; if not, the run was asked to stop, and the state is saved.
    """
    plan, last = state.plan, state.total_steps
    where, asked = device(), state.requests.came_or_time_is_up
    limit = plan.config.run.collective_timeout_minutes * 60
    progress = tqdm(total=last, initial=plan.start_step, disable=not state.is_main, unit="step")
    with Watchdog(plan.folder.path, plan.world, limit, plan.start_step) as watchdog, progress:
        for step, micro_batches in steps_from(state.batches, plan.start_step, last):
            if step == plan.start_step + 1 or step % plan.config.parallel.consistency_check_steps == 0:
                check_same_batch(micro_batches, step)
                check_same_replicas(state.engine.module, step)
            detail = state.router_log.is_due(step, last)
            result = train_step(state.assembled, micro_batches, state.router_load, where, step, detail, asked)
            state.metrics.add(result)
            progress.update()
            stops = result.stop_requests > 0 and step != last
            log_step(state, step, progress, stops)
            with watchdog.paused(step):
                if stops:
                    save_and_leave(state, step)
                    return False
                evaluate_and_save(state, step)
    state.checkpoints.finish()
    return True


def log_step(state: Run, step: int, progress: tqdm, stops: bool) -> None:
    """Lines of metrics and router statistics where they are due; where the run ends, over what is not yet logged."""
    last = state.total_steps
    is_due = step % state.plan.config.run.logging_steps == 0 or step == last or stops
    details = state.router_log.is_due(step, last) or stops
    if is_due or details:
        state.checkpoints.check_claim()
    if is_due:
        line = state.metrics.log(step, state.engine.get_lr()[0])
        progress.set_postfix_str(f"loss {line['loss']:.4f}, {line['tokens_per_second']:.0f} tokens/s")
    if details:
        say(state.plan, *state.router_log.write(step))


def evaluate_and_save(state: Run, step: int) -> None:
    """An evaluation and a checkpoint, where they are due."""
    settings, last = state.plan.config.run, state.total_steps
    if settings.eval_steps and step % settings.eval_steps == 0 and step != last:
        evaluate_now(state, step)
    if step % settings.save_steps == 0 or step == last:
        state.requests.clock.save_starts(step)
        state.checkpoints.save(state.assembled, step)


def save_and_leave(state: Run, step: int) -> None:
    """A committed checkpoint, and why there is one."""
    reason = state.requests.agreed_reason()
    state.checkpoints.save(state.assembled, step)
    state.checkpoints.finish()
    saved = state.plan.folder.checkpoints / f"step_{step}"
    state.requests.leave(f"stopped after step {step} of {state.total_steps}: {reason}; saved {saved}")


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


def evaluate_now(state: Run, step: int) -> None:
    """Score the validation records, if there are any, and log the result."""
    settings, grid, records = state.plan.config, state.plan.grid, state.data.validation
    if not len(records):
        return
    size = settings.optimizer.per_device_eval_batch_size
    pad = state.tokenizer.pad_token_id
    prompts = generation_batches(
        records, size, grid.dp_rank, grid.data_parallel, pad, settings.run.max_generate_records
    )
    evaluation, answers = evaluate(
        state.assembled,
        state.router_load,
        sorted(set(records["task"])),
        EvalBatches(records, size, grid.dp_rank, grid.data_parallel, pad),
        prompts,
        state.tokenizer,
        settings.run.max_new_tokens,
        device(),
        ExactMatch(settings.run.answer_pattern),
    )
    state.checkpoints.check_claim()
    state.evaluations.append(evaluation)
    state.metrics.log_evaluation(step, evaluation, answers)
    state.router_log.write(step, VALIDATION)


def write_final_adapter(state: Run) -> None:
    """The adapter folder: whole, finite, and read back before the run says done."""
    adapter = gather_adapter(state.engine)

    def write() -> None:
        if state.is_main:
            write_adapter(adapter, peft_config(state.engine), state.plan.folder.adapter, state.kept_tokenizer)

    groups.together("write the final adapter", write)
