"""What lies under the names that a run is given: the same records on every rank, and those of the run it continues."""

from dataclasses import replace
from pathlib import Path

from comol_ds.data.prepare import PreparedData
from comol_ds.data.templates import PromptTemplate
from comol_ds.errors import UserError
from comol_ds.parallel import groups
from comol_ds.training.identity import RunIdentity, stamp_of_weights
from comol_ds.training.plan import RunPlan
from comol_ds.training.resume import read_checkpoint


def identify_content(plan: RunPlan, data: PreparedData) -> RunIdentity:
    """The plan's identity with stamps of data and weights, compared with the checkpoint's. A collective call.

    Raises:
        UserError: the ranks have read different records, or the checkpoint's run did, or wrote its prompts otherwise;
            on every rank.
    """
    model, stamps = plan.config.model, groups.gather_objects(data.report.stamps, "compare the data")
    downloads = not Path(model.model_name_or_path).is_dir()
    for rank, theirs in enumerate(stamps):
        for name in (name for name in stamps[0] if theirs.get(name) != stamps[0][name]):
            raise UserError(
                f"{name} holds {theirs.get(name)} for rank {rank} and {stamps[0][name]} for rank 0: the nodes have"
                " other files of this name; give one that all nodes share"
            )
    reads_weights = plan.world.rank == 0 and not model.init_random and not (plan.config.run.dry_run and downloads)
    stamp = groups.together(
        "look at the weights", lambda: stamp_of_weights(model.model_name_or_path) if reads_weights else None
    )
    weights = groups.gather_objects(stamp, "tell the weights")[0]
    identity = replace(plan.identity, data_content=stamps[0], base_weights=weights)
    # every rank calls, and rank 0 looks: another node may see an older list of checkpoints, or none
    compares = plan.world.rank == 0 and plan.resume is not None
    groups.together(
        "compare with the checkpoint",
        lambda: _compare(plan, identity, data.template) if compares else None,
    )
    return identity


def _compare(plan: RunPlan, identity: RunIdentity, template: PromptTemplate) -> None:
    resume = read_checkpoint(plan.resume.path, identity, plan.folder)
    if template.unasked and "data.prompt_template" in resume.difference.unknown:
        raise UserError(
            f"checkpoint {resume.path} was written before chat templates were the default; give --prompt_template"
            " alpaca (instructions, questions) or none (prompts) to go on with the prompts that it was trained with, or"
            " chat to change them"
        )
