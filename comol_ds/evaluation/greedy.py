"""Generation that means what its caller says, whatever the base's generation_config.json recommends."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


@contextmanager
def plain_generation(
    model: PreTrainedModel | Any,
    tokenizer: PreTrainedTokenizerBase,
    keeps_own: bool = False,
    end_tokens: Iterable[int] = (),
) -> Iterator[list[int]]:
    """Inside, ``model.generate`` takes no setting from the base: without options it is greedy.

    transformers fills every setting that a caller leaves open from ``model.generation_config``, a repetition penalty or
    suppressed tokens too, and most of them have no value that means "none". So the model is lent a configuration that
    holds nothing but the special tokens.

    Args:
        model: a model of transformers, or a PEFT model around one.
        tokenizer: the one that the model was trained with.
        keeps_own: leave the base's other settings in force, for sampling.
        end_tokens: further ids that end an answer.

    Yields:
        The ids that end an answer: the tokenizer's end of sequence, what the base ends a turn with, and `end_tokens`.
    """
    configured = model.generation_config
    lent = deepcopy(configured) if keeps_own else GenerationConfig()
    lent.bos_token_id = configured.bos_token_id
    lent.eos_token_id = sorted({*as_ids(tokenizer.eos_token_id), *as_ids(configured.eos_token_id), *end_tokens})
    lent.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    # PEFT writes the wrapper's configuration, where it has one of its own, over the base's before it generates
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    owned = [(owner, vars(owner)["generation_config"]) for owner in (model, base) if "generation_config" in vars(owner)]
    try:
        for owner, _ in owned:
            owner.generation_config = lent
        yield lent.eos_token_id
    finally:
        for owner, own in owned:
            owner.generation_config = own


def as_ids(ids: int | list[int] | None) -> list[int]:
    """The end-of-sequence ids of a configuration or a call, which may be one, several or none."""
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
