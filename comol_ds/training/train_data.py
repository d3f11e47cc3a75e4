"""The data of a run as its steps take them, checked against the base model."""

from transformers import PreTrainedTokenizerBase

from comol_ds.data.batches import TrainBatches
from comol_ds.data.prepare import PreparedData, prepare_data
from comol_ds.data.streaming import StreamingBatches
from comol_ds.training.base_checks import check_answers, check_token_ids
from comol_ds.training.plan import RunPlan


def train_data(
    plan: RunPlan, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreparedData, TrainBatches | StreamingBatches]:
    """The prepared data, and this rank's share of every global batch.

    Raises:
        UserError: data that cannot be used, tokens or positions that the base does not have, or too few records for
            one batch.
    """
    data = prepare_data(plan.config.data, tokenizer, plan.config.run.seed)
    check_token_ids(data, tokenizer, plan.embedding_rows)
    check_answers(data, plan.config, plan.position_table)
    return data, _batches(plan, data, tokenizer.pad_token_id)


def _batches(plan: RunPlan, data: PreparedData, pad_token_id: int) -> TrainBatches | StreamingBatches:
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
