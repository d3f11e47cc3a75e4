"""From text to ids as serving makes them."""

from transformers import PreTrainedTokenizerBase

from comol_ds.errors import UserError


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids the tokenizer puts before a text by itself (its BOS, if it adds one), without those it puts after."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    raise UserError(
        f"the tokenizer of {tokenizer.name_or_path!r} splits a text differently with special tokens; use another one"
    )
