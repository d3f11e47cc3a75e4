"""A trained adapter on its base, ready to generate in plain transformers: exact, on any device."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from comol_ds.adapters.base_fit import check_base, linear_sizes
from comol_ds.base_config import NO_OWN_CODE, told
from comol_ds.data.chat import ChatRenderer
from comol_ds.errors import UserError, one_line
from comol_ds.evaluation.greedy import as_ids, plain_generation
from comol_ds.export.source import AdapterSource, find_adapter, weights_in
from comol_ds.router_load.counting import VALIDATION
from comol_ds.router_load.tracking import track_router_load


def load_for_inference(
    checkpoint: str | os.PathLike,
    base: str | None = None,
    dtype: torch.dtype | str = "auto",
    **model_options: Any,
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """A trained adapter on its base model, in evaluation mode, and the tokenizer.

        model, tokenizer = load_for_inference("runs/first")
        answers, load = generate(model, tokenizer, ["12 + 30 ="])

    Args:
        checkpoint: a run folder, a checkpoint of it, or an adapter folder.
        base: base model folder or hub name, instead of the one that the adapter names.
        dtype: of the base; "auto" is the one that its files have. The adapter stays in fp32.
        model_options: for from_pretrained, such as device_map, or trust_remote_code for a base with its own code.

    Raises:
        UserError: there is no such adapter or base, or the adapter was trained on another one.
    """
    source = find_adapter(checkpoint, base)
    model = load_adapted(source, dtype, **model_options)
    return model, load_tokenizer(source, model_options.get("trust_remote_code", False))


def load_adapted(source: AdapterSource, dtype: torch.dtype | str = "auto", **model_options: Any) -> PeftModel:
    """The adapter on its base, in evaluation mode; arguments and errors as of `load_for_inference`."""
    base = load_base(source.base, dtype, **model_options)
    check_base(source.config, source.tensors, linear_sizes(base), str(source.folder), source.base)
    return PeftModel.from_pretrained(base, source.folder).eval()


def load_base(base: str, dtype: torch.dtype | str = "auto", **model_options: Any) -> PreTrainedModel:
    """The frozen base model, in evaluation mode.

    Raises:
        UserError: it cannot be loaded, or its index lists a file outside its folder.
    """
    if os.path.isfile(os.path.join(base, SAFE_WEIGHTS_INDEX_NAME)):
        weights_in(Path(base))  # transformers itself follows whatever path an index lists
    options = {"trust_remote_code": False} | model_options
    with told(f"base {base!r}", "give --model_name_or_path", NO_OWN_CODE):
        return AutoModelForCausalLM.from_pretrained(base, dtype=dtype, **options).eval()


def load_tokenizer(source: AdapterSource, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer that the adapter was trained with.

    Raises:
        UserError: it cannot be loaded.
    """
    with told(f"the tokenizer of {source.tokenizer!r}", "copy its files there", NO_OWN_CODE):
        return AutoTokenizer.from_pretrained(source.tokenizer, trust_remote_code=trust_remote_code)


@torch.no_grad()
def generate(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[dict[str, Any]]],
    tasks: Sequence[str] | None = None,
    max_new_tokens: int = 64,
    chat: bool = False,
    **generation_options: Any,
) -> tuple[list[str], dict[str, Any]]:
    """Answer a batch of prompts, and say what the routers did.

    The routers are watched in one more pass over prompts and answers: in generation itself, the rows that have ended
    are padded without a mask.

    Args:
        model, tokenizer: from `load_for_inference`.
        prompts: texts, or with ``chat`` also conversations, lists of turns {"role": ..., "content": ...}; padded on the
            left, and padding is not counted.
        tasks: a label per prompt, to count each task apart.
        max_new_tokens: longest answer, in tokens.
        chat: write the prompts with the tokenizer's chat template, a text as the only turn of a user. The tokenizer of
            a run's adapter has the template that wrote its training data.
        generation_options: for model.generate; of a mixed batch (adapter_names) the routers of the rows of the
            adapter "default" are watched. Without any it is greedy and takes nothing from the base's
            generation_config.json but the tokens that end an answer; with do_sample=True the base's other settings hold
            where none is given here.

    Returns:
        The answers without their prompts, and the router statistics over the tokens of prompts and answers, {"tokens":
        ..., "layers": {name: ...}}, see `RouterCounts.pop`.

    Raises:
        UserError: the number of tasks is not that of the prompts, there is no chat template, or it refuses a prompt.
    """
    if tasks is not None and len(tasks) != len(prompts):
        raise UserError(f"{len(tasks)} tasks for {len(prompts)} prompts; give one per prompt")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    padded = {"return_tensors": "pt", "padding": True, "padding_side": "left"}
    if chat:  # a template writes its own start tokens
        batch = tokenizer(_written(prompts, tokenizer), add_special_tokens=False, **padded).to(model.device)
    else:
        batch = tokenizer(list(prompts), **padded).to(model.device)
    turn_ends = _turn_ends(tokenizer) if chat else ()
    keeps_own = bool(generation_options.get("do_sample"))
    with plain_generation(model, tokenizer, keeps_own=keeps_own, end_tokens=turn_ends) as ends:
        ids = model.generate(**batch, max_new_tokens=max_new_tokens, **generation_options)
        ends = as_ids(generation_options.get("eos_token_id", ends))
    written = ids[:, batch["input_ids"].shape[1] :]
    mask = torch.cat([batch["attention_mask"], _until_end(written, ends)], dim=1)
    with track_router_load(model, tasks=sorted(set(tasks or ()))) as load:
        if tasks is not None:
            load.label_rows(tasks)
        mixed = {name: value for name, value in generation_options.items() if name == "adapter_names"}
        model(input_ids=ids, attention_mask=mask, logits_to_keep=1, use_cache=False, **mixed)
        statistics = load.read(VALIDATION)
    return tokenizer.batch_decode(written, skip_special_tokens=True), statistics


def _written(prompts: Sequence[str | list[dict[str, Any]]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Prompts as the chat template asks them, up to where the answer begins."""
    if not tokenizer.chat_template:
        raise UserError(
            f"chat=True: the tokenizer of {tokenizer.name_or_path!r} has no chat template; the adapter was trained on"
            " prompts as they are, give them so"
        )
    chats = [[{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt for prompt in prompts]
    try:
        return tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template may raise anything
        raise UserError(
            f"chat=True: the chat template refuses a prompt: {one_line(error)}; change its turns"
        ) from error


def _turn_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The id that the chat template ends an answer with, which need not be the end of sequence; none where it has none
    or refuses a short conversation."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        probe = ChatRenderer(tokenizer, None)({"messages": turns}, "probe")
    except UserError:
        return []
    return tokenizer(probe.text, add_special_tokens=False)["input_ids"][-1:] if probe.is_ended else []


def _until_end(written: torch.Tensor, ends: list[int]) -> torch.Tensor:
    """written [B, T] -> mask [B, T], 1 up to each row's first id of ``ends`` and there."""
    is_end = torch.isin(written, torch.tensor(ends, device=written.device)).long()
    return ((is_end.cumsum(1) - is_end) == 0).long()
