"""What a run says about itself in words: --dry_run, the lines at the start, the table at the end."""

import json
from pathlib import Path

import yaml
from transformers import PreTrainedTokenizerBase

from comol_ds.config import ModelSettings
from comol_ds.data.batches import asked_records
from comol_ds.data.prepare import PreparedData
from comol_ds.data.tokenization import format_example
from comol_ds.errors import UserError
from comol_ds.evaluation.answers import ExactMatch, reference_lines
from comol_ds.layout import RankGrid
from comol_ds.parallel.assemble import build_skeleton
from comol_ds.parallel.staging import open_weights
from comol_ds.parallel.weight_names import find_weights
from comol_ds.planner.plan import Planner
from comol_ds.planner.report import table
from comol_ds.planner.request import Request
from comol_ds.training.content import identify_content
from comol_ds.training.evaluation import Evaluation, comparison_table
from comol_ds.training.plan import RunPlan, load_tokenizer
from comol_ds.training.train_data import train_data


def describe_run(plan: RunPlan) -> str:
    """The resolved configuration, batch arithmetic, parameter counts, data report, the planned memory and
    communication, and one tokenized example.

    Raises:
        UserError: whatever the run would refuse before its first step.
    """
    tokenizer = load_tokenizer(plan.config.model.tokenizer_path, plan.config.model.trust_remote_code)
    data, _ = train_data(plan, tokenizer)
    check_weights(plan.config.model)
    identify_content(plan, data)
    example = next(iter(data.train))
    return "\n".join(
        [
            "# run",
            yaml.safe_dump(plan.config.flat(), sort_keys=False).rstrip(),
            "# DeepSpeed",
            json.dumps(plan.ds_config, indent=2),
            "# sizes",
            batches_line(plan),
            parameters_line(plan),
            *plan.notes,
            data.report.summary(),
            *answer_lines(plan, data, tokenizer),
            "# memory and communication",
            planned_table(plan),
            "# first training record, [[ ]] around what the loss counts",
            format_example(example, tokenizer),
        ]
    )


def check_weights(settings: ModelSettings) -> None:
    """Refuse weights in a folder that do not belong to the model; headers are read only, and nothing is downloaded.

    Raises:
        UserError: see `open_weights` and `find_weights`.
    """
    path = settings.model_name_or_path
    if Path(path).is_dir() and not settings.init_random:
        find_weights(build_skeleton(settings, path, settings.bf16), open_weights(path))


def batches_line(plan: RunPlan) -> str:
    """The batch arithmetic, and how the ranks are divided where tensor parallelism shares a model between them."""
    grid = plan.grid
    ranks = f"; {grid.tensor_parallel} tensor-parallel x {grid.data_parallel} data-parallel = {grid.size} ranks"
    return f"batches: {plan.batches}{ranks if grid.tensor_parallel > 1 else ''}"


def parameters_line(plan: RunPlan) -> str:
    """Trainable and all parameters, in PEFT's words."""
    share = 100 * plan.trainable_parameters / plan.all_parameters
    return (
        f"trainable params: {plan.trainable_parameters:,d} || all params: {plan.all_parameters:,d}"
        f" || trainable%: {share:.4f}"
    )


def answer_lines(plan: RunPlan, data: PreparedData, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What keeps answers from ever equalling their references, where something does.

    Raises:
        UserError: --answer_pattern finds nothing in any reference.
    """
    settings = plan.config.run
    asked = asked_records(data.validation, settings.max_generate_records)
    references = data.validation.select(asked)["reference"][:]
    return reference_lines(references, ExactMatch(settings.answer_pattern), tokenizer, settings.max_new_tokens)


def resume_lines(plan: RunPlan, total_steps: int) -> list[str]:
    """Where the run starts, by which route, what is not as before, and the checkpoints that were passed over."""
    if plan.resume is not None:
        route = f"resumed from {plan.resume.path}: step {plan.start_step} of {total_steps}, {plan.resume.route}"
        if plan.start_step >= total_steps:
            return [*plan.passed_over, f"{route}, no step left to train"]
        changed, unknown = plan.resume.difference.changed, plan.resume.difference.unknown
        return [
            *plan.passed_over,
            route,
            *([f"from here on: {', '.join(changed)}"] if changed else []),
            *([f"not compared, the checkpoint does not say: {', '.join(unknown)}"] if unknown else []),
        ]
    if plan.config.run.resume_from_checkpoint:
        return [*plan.passed_over, f"no checkpoint in {plan.folder.checkpoints} yet: starting from step 0"]
    return []


def planned_table(plan: RunPlan) -> str:
    """What launch/plan.py would say of this world; why not, for a model that cannot be planned."""
    rank_0 = RankGrid(0, plan.grid.size, plan.grid.tensor_parallel)
    try:
        return table(Planner().plan(Request(plan.config, plan.ds_config, rank_0, plan.batches, plan.world.local_size)))
    except UserError as error:
        return f"not planned: {error}"


def result_lines(plan: RunPlan, evaluations: list[Evaluation]) -> list[str]:
    """What was learnt, where everything is, and a next command."""
    counted = plan.config.router.router_load
    return [
        *_scores(plan, evaluations),
        f"\nadapter:       {plan.folder.adapter}",
        f"metrics:       {plan.folder.metrics}",
        *([f"router load:   {plan.folder.router_load}"] if counted else []),
        f"checkpoints:   {plan.folder.checkpoints}",
        f"next:          tensorboard --logdir {plan.folder.path / 'tensorboard'}",
        *([f"               python launch/router_report.py {plan.folder.path}"] if counted else []),
    ]


def _scores(plan: RunPlan, evaluations: list[Evaluation]) -> list[str]:
    if not evaluations and plan.folder.was_evaluated(plan.start_step):
        return [f"\nevaluated before: {plan.folder.evaluations}"]
    if not evaluations:
        return ["\nno validation records, nothing was evaluated"]
    before = evaluations[0] if len(evaluations) > 1 else None
    changed = " (first evaluation -> last)" if before else ""
    return [f"\nheld-out records{changed}:", comparison_table(before, evaluations[-1])]
