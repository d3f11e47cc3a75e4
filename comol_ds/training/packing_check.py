"""Refuses packed rows for a model in which records of one row do not stay apart."""

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from comol_ds.config import RunConfig
from comol_ds.data.collate import packed_batch, padded_batch
from comol_ds.errors import UserError
from comol_ds.parallel.shrunken import VOCABULARY, NotShrinkable, logits_of, shrunken_copy
from comol_ds.training.step import model_inputs

_SAME = 1e-4  # of the largest logit: rounding in fp32, and far below what a wrong neighbour or position changes
_FIRST, _SECOND = 9, 7  # tokens of the records


def check_packing(model_config: PreTrainedConfig, config: RunConfig) -> None:
    """Refuse --packing unless a packed record gets the logits that it gets alone in a row.

    Attention is blocked between records where it obeys position_ids. Layers that carry state along the row (linear
    attention, convolutions, state spaces) and positions that are counted along it need not obey. So it is tried, on a
    small copy of the model.

    Args:
        model_config: the base model's.
        config: the run's settings.

    Raises:
        UserError: the records do not stay apart, or no small copy of the model runs.
    """
    if not config.data.packing:
        return
    settings, kind = config.model, model_config.model_type
    rows = config.optimizer.per_device_train_batch_size
    if settings.attn_implementation == "flash_attention_2" and rows > 1:
        # transformers.modeling_flash_attention_utils._is_packed_sequence looks at a single row only
        raise UserError(
            f"--packing with --attn_implementation flash_attention_2 keeps records apart in batches of one row, not of"
            f" --per_device_train_batch_size {rows}; use 1 and a longer --max_length, or --attn_implementation sdpa"
        )
    try:
        model = shrunken_copy(model_config, settings.attn_implementation, config.data.max_length)
        fault = packing_fault(model)
    except NotShrinkable as error:
        fault = f"cannot be tried on a small copy of it: {error}"
    if fault is not None:
        raise UserError(
            f"--packing with model type {kind!r}: {fault}; train without --packing, --group_by_length puts records of"
            " similar length together"
        )


def packing_fault(model: PreTrainedModel) -> str | None:
    """What goes wrong when the model is given two records in one row; None if each gets the logits it gets alone.

    Args:
        model: in evaluation mode, with an embedding of `VOCABULARY` rows.
    """
    generator = torch.Generator().manual_seed(0)
    first, other, second = (_record(length, generator) for length in (_FIRST, _FIRST, _SECOND))
    packed = _logits(model, packed_batch([[first, second], [other, second]], pad_token_id=0))  # [2, T, V]
    after_first, after_other = packed[:, _FIRST:]
    alone = _logits(model, padded_batch([second], pad_token_id=0))[0]
    assert not _same(packed[0, :_FIRST], packed[1, :_FIRST]), "other tokens, other logits: the model ignores its input"
    if not _same(after_first, after_other):
        return "the record before it in a row changes what a record's logits are"
    if not _same(after_first, alone):
        return "a record behind another in a row gets other positions than alone"
    return None


def _record(length: int, generator: torch.Generator) -> dict:
    ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
    return {"input_ids": ids, "labels": ids, "record_id": None, "task": None}


def _logits(model: PreTrainedModel, batch: dict) -> torch.Tensor:
    return logits_of(model, **model_inputs(batch, torch.device("cpu")))


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= _SAME * expected.abs().max())
