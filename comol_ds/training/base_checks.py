"""Whether a base model, its tokenizer and the run's rows fit each other: decided before weights are read."""

import copy
from dataclasses import dataclass

import datasets
import torch
from pyarrow import compute
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from comol_ds.config import RunConfig
from comol_ds.data.batches import asked_records
from comol_ds.data.prepare import PreparedData
from comol_ds.errors import UserError
from comol_ds.parallel.shrunken import VOCABULARY, NotShrinkable, logits_of, shrunken_copy

_POSITIONS = 16  # of the small copy on which longer rows are tried


@dataclass(frozen=True)
class Positions:
    """What is known of a model's positions, where a run's rows or answers may exceed their number.

    Attributes:
        table: their number, if they are looked up in a table.
        note: what is to be said of rows that are longer than the number.
    """

    table: int | None = None
    note: str | None = None


def check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: RunConfig) -> int | None:
    """Refuse a tokenizer that gives ids for which the model's embedding has no row.

    A tokenizer may know added tokens beyond the embedding that no text contains, as Gemma 3's of 1B knows one for
    images: then the data decide, see `check_token_ids`.

    Args:
        model: the base, on any device.
        tokenizer: that of the run.
        config: the run's settings.

    Returns:
        Rows of the embedding where the data must be looked at, else None.

    Raises:
        UserError: another model's tokenizer with more ids than rows, one whose vocabulary is larger than the
            embedding, or padding, start or end tokens beyond it.
    """
    rows = model.get_input_embeddings().num_embeddings
    ids = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))
    if ids <= rows:
        return None
    settings = config.model
    if settings.tokenizer_name is not None:
        raise UserError(
            f"--tokenizer_name {settings.tokenizer_name} has {ids} ids, the model's embedding {rows} rows; use the"
            " model's own tokenizer"
        )
    added = tokenizer.added_tokens_decoder
    special = {name: getattr(tokenizer, f"{name}_id") for name in ("pad_token", "bos_token", "eos_token")}
    beyond = next((f"{name} has id {number}" for name, number in special.items() if (number or 0) >= rows), None)
    if beyond is None and any(number >= rows and number not in added for number in tokenizer.get_vocab().values()):
        beyond = f"it has {ids} ids"
    if beyond is not None:
        raise UserError(
            f"the tokenizer of {settings.model_name_or_path}: {beyond}, the model's embedding {rows} rows; take model"
            " and tokenizer files that belong together, or enlarge the embedding with resize_token_embeddings and save"
            " the model"
        )
    return rows


def check_token_ids(data: PreparedData, tokenizer: PreTrainedTokenizerBase, rows: int | None) -> None:
    """Refuse records with a token for which the embedding has no row. Streams are not looked at.

    Args:
        rows: what `check_tokenizer` returned.

    Raises:
        UserError: naming a record and the token.
    """
    if rows is None:
        return
    for records in (data.train, data.validation):
        if not isinstance(records, datasets.Dataset):
            continue
        columns = records.select_columns(["record_id", "input_ids"]).with_format("arrow")
        for batch in columns.iter(batch_size=1000):  # a loop over the records takes a minute for a million
            if (compute.max(compute.list_flatten(batch["input_ids"])).as_py() or 0) < rows:
                continue
            largest = ((record["record_id"], max(record["input_ids"], default=0)) for record in batch.to_pylist())
            record, token = next(found for found in largest if found[1] >= rows)
            raise UserError(
                f"record {record} holds {tokenizer.convert_ids_to_tokens(token)!r}, a token of id {token}, and the"
                f" model's embedding has {rows} rows; remove it from the data"
            )


def check_positions(model_config: PreTrainedConfig, config: RunConfig) -> Positions:
    """Refuse rows that are longer than a model's table of positions.

    Most models compute positions and run on, others look them up in a table, and the number in the configuration is
    the same. So longer rows are tried, on a small copy that was made for few positions.

    Raises:
        UserError: longer rows do not run.
    """
    limit = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    length, run = config.data.max_length, config.run
    longest = length + (run.max_new_tokens if run.max_generate_records else 0)
    if type(limit) is not int or longest <= limit:
        return Positions()
    if _runs_beyond(model_config, config.model.attn_implementation):
        note = f"note: --max_length {length} is more than the {limit} positions that the model was made for"
        return Positions(note=note if length > limit else None)
    if length <= limit:
        return Positions(table=limit)
    raise UserError(
        f"--max_length {length} is more than the {limit} positions that the model has (max_position_embeddings); use"
        f" --max_length {limit} or less"
    )


def check_answers(data: PreparedData, config: RunConfig, table: int | None) -> None:
    """Refuse answers that would grow beyond a model's table of positions, which would end the run at its evaluation.

    Args:
        table: what `check_positions` found.

    Raises:
        UserError: naming the record with the longest prompt.
    """
    if table is None or not len(data.validation):
        return
    asked = asked_records(data.validation, config.run.max_generate_records)
    if not asked:
        return
    record = data.validation[asked[0]]  # the longest prompt comes first
    room = table - record["prompt_length"]
    if room < config.run.max_new_tokens:
        raise UserError(
            f"--max_new_tokens {config.run.max_new_tokens}: the prompt of record {record['record_id']} has"
            f" {record['prompt_length']} tokens, and the model {table} positions; use"
            f" {f'--max_new_tokens {room}, ' if room > 0 else ''}a shorter --max_length, or --max_generate_records 0"
        )


def _runs_beyond(model_config: PreTrainedConfig, attn_implementation: str) -> bool:
    small = copy.deepcopy(model_config)
    small.get_text_config().max_position_embeddings = _POSITIONS
    try:
        model = shrunken_copy(small, attn_implementation)
    except NotShrinkable:  # nothing is known, and nothing refused
        return True
    try:
        logits_of(model, input_ids=torch.arange(2 * _POSITIONS).unsqueeze(0) % VOCABULARY)
    except (IndexError, RuntimeError, ValueError):  # from an embedding, a buffer, or transformers' own check
        return False
    return True
