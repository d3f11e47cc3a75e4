"""Everything that a run needs before its first step, in the order in which it is made."""

import filecmp
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from comol_ds.adapters.kept_tokenizer import tokenizer_files
from comol_ds.data.batches import TrainBatches
from comol_ds.data.prepare import PreparedData
from comol_ds.data.streaming import StreamingBatches
from comol_ds.parallel import groups
from comol_ds.parallel.assemble import Assembled, assemble, total_steps
from comol_ds.parallel.monitor import open_monitor
from comol_ds.training.checkpoint import CheckpointWriter, load_checkpoint
from comol_ds.training.content import identify_content
from comol_ds.training.describe import answer_lines, batches_line, parameters_line, resume_lines
from comol_ds.training.evaluation import Evaluation
from comol_ds.training.metrics import Metrics
from comol_ds.training.plan import RunPlan, load_tokenizer
from comol_ds.training.preemption import StopRequests
from comol_ds.training.resume import settle_resume
from comol_ds.training.router_load import RouterLoad
from comol_ds.training.router_log import RouterLog
from comol_ds.training.train_data import train_data


@dataclass
class Run:
    """What the steps of the story hand to each other.

    `kept_tokenizer` has the files of the tokenizer with the template of the data; on rank 0, which writes adapters.
    """

    plan: RunPlan
    tokenizer: PreTrainedTokenizerBase
    kept_tokenizer: dict[str, bytes]
    data: PreparedData
    batches: TrainBatches | StreamingBatches
    assembled: Assembled
    checkpoints: CheckpointWriter
    total_steps: int
    router_load: RouterLoad
    metrics: Metrics
    router_log: RouterLog
    requests: StopRequests
    evaluations: list[Evaluation] = field(default_factory=list)

    @property
    def engine(self) -> Any:
        return self.assembled.engine

    @property
    def is_main(self) -> bool:
        return self.plan.world.rank == 0


def set_up(plan: RunPlan, requests: StopRequests) -> Run | None:
    """Data, model, engine and run folder; continues a checkpoint if the plan found one.

    Returns:
        None if the run folder holds all that this run would write.
    """
    config, world = plan.config, plan.world
    say(plan, batches_line(plan), parameters_line(plan), *plan.notes)
    tokenizer = load_tokenizer(config.model.tokenizer_path, config.model.trust_remote_code)
    data, batches = groups.first_on_each_node(world, "prepare the data", lambda: train_data(plan, tokenizer))
    say(plan, data.report.summary(), *answer_lines(plan, data, tokenizer))
    plan = replace(plan, identity=identify_content(plan, data))
    steps = total_steps(config.optimizer, batches.steps_per_epoch)
    if is_finished(plan, data, steps):
        say(plan, *resume_lines(plan, steps), f"the run is finished, its adapter is {plan.folder.adapter}")
        return None
    assembled = assemble(config, config.model.model_name_or_path, plan.ds_config, steps, config.model.bf16)
    kept = groups.together("keep the tokenizer", lambda: kept_tokenizer(plan, tokenizer, data))
    checkpoints = claim_run_folder(plan, kept)
    if config.run.resume_from_checkpoint:
        resume, passed_over = settle_resume(config.run.resume_from_checkpoint, plan.folder, plan.identity, world)
        plan = replace(plan, resume=resume, passed_over=passed_over)
    say(plan, *resume_lines(plan, steps))
    if plan.resume is not None:
        load_checkpoint(assembled, plan.resume, plan.identity, world)
    groups.together("prepare the run folder", lambda: prepare_folder(plan))
    monitor = open_monitor(config.run.report_to, str(plan.folder.path))
    router_load = RouterLoad(assembled.engine.module, config.router, task_labels(data))
    router_log = RouterLog(plan, router_load, monitor)
    return Run(
        plan,
        tokenizer,
        kept,
        data,
        batches,
        assembled,
        checkpoints,
        max(steps, plan.start_step),
        router_load,
        Metrics(plan, monitor),
        router_log,
        requests,
    )


def is_finished(plan: RunPlan, data: PreparedData, total_steps: int) -> bool:
    """Whether a checkpoint of this run's last step has its evaluation and its adapter beside it. A collective call.

    Rank 0 looks, for another node may see an older list of checkpoints.
    """

    def look() -> bool:
        ended = plan.resume is not None and plan.resume.is_own and plan.start_step >= total_steps
        if plan.world.rank != 0 or not ended:
            return False
        stored = plan.resume.path / "adapter"
        names = [str(path.relative_to(stored)) for path in stored.rglob("*") if path.is_file()]
        same, _, _ = filecmp.cmpfiles(stored, plan.folder.adapter, names, shallow=False)
        is_evaluated = len(data.validation) == 0 or plan.folder.was_evaluated(plan.start_step)
        return is_evaluated and sorted(same) == sorted(names)

    return groups.gather_objects(groups.together("look for the results", look), "tell whether all is done")[0]


def task_labels(data: PreparedData) -> list[str]:
    """The labels of the records, the most frequent first; of a stream, those of the validation data. One alone says
    nothing: none."""
    counts = Counter(data.report.tasks)
    counts.update(dict.fromkeys(data.validation["task"], 0))
    labels = sorted(counts, key=lambda label: (-counts[label], label))
    return labels if len(labels) > 1 else []


def kept_tokenizer(plan: RunPlan, tokenizer: PreTrainedTokenizerBase, data: PreparedData) -> dict[str, bytes]:
    """What lies beside every adapter of the run, on rank 0; a tokenizer with it sends prompts as they were trained."""
    return tokenizer_files(tokenizer, data.template.chat_template) if plan.world.rank == 0 else {}


def claim_run_folder(plan: RunPlan, tokenizer: dict[str, bytes]) -> CheckpointWriter:
    """From here on no earlier process of this run can commit a checkpoint. A collective call."""
    folder, settings = plan.folder, plan.config.run
    groups.together("take the run folder", lambda: folder.take() if plan.world.rank == 0 else None)
    checkpoints = CheckpointWriter(
        folder.checkpoints,
        folder.generations,
        plan.identity,
        plan.world,
        settings.save_total_limit,
        settings.collective_timeout_minutes * 60,
        tokenizer,
    )
    say(plan, *(f"deleted what an interrupted save has left: {name}" for name in checkpoints.removed))
    return checkpoints


def prepare_folder(plan: RunPlan) -> None:
    """Rank 0 creates the run folder and writes the resolved configuration."""
    if plan.world.rank == 0:
        plan.folder.prepare(plan.config, plan.ds_config, plan.start_step)


def say(plan: RunPlan, *lines: str) -> None:
    """Print on rank 0."""
    if plan.world.rank == 0:
        for line in lines:
            print(line, flush=True)
