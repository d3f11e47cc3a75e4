"""From text to ids as serving makes them: what stands before a text, and how a text goes on."""

from collections.abc import Sequence
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from comol_ds.errors import UserError

# Nothing merges across it, in almost every tokenizer.
_BREAK = "\n"


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


def piece_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Sequence[str]]) -> list[list[list[int]]]:
    """The ids of texts that are cut into pieces, piece by piece; special tokens in the text are recognized, none added.

    A piece gets the ids with which it continues the piece before: a tokenizer that puts a space before a text (Llama 2,
    Mistral 0.1) would put one before every piece that is tokenized on its own. Where a token would reach across the
    border (byte-level BPE joins "\\n" and what follows) the border holds, and the ids before it are those of the text
    up to there: they are what a model is given there in generation.

    Args:
        texts: the pieces of every text, none of them empty.
    """
    joined = [[before + piece for before, piece in pairwise(pieces)] for pieces in texts]
    ids = iter(
        _tokenize(tokenizer, [text for both in zip(texts, joined, strict=True) for group in both for text in group])
    )
    result, broken = [], []
    for pieces in texts:
        alone = [next(ids) for _ in pieces]
        split = alone[:1]
        for number in range(1, len(pieces)):
            before, both = alone[number - 1], next(ids)
            follows = both[: len(before)] == before
            split.append(both[len(before) :] if follows else alone[number])
            if not follows:
                broken.append((split, number, pieces[number]))
        result.append(split)
    head = _tokenize(tokenizer, [_BREAK])[0] if broken else []
    for (split, number, _), both in zip(
        broken, _tokenize(tokenizer, [_BREAK + piece for _, _, piece in broken]), strict=True
    ):
        if both[: len(head)] == head:
            split[number] = both[len(head) :]
    return result


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """All texts in one call, which fast tokenizers do in parallel."""
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
