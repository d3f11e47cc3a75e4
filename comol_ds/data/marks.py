"""The tokens that a tokenizer adds to its vocabulary, as they stand in a rendered text."""

import re

from transformers import PreTrainedTokenizerBase

from comol_ds.errors import UserError


class Marks:
    """Finds special tokens, which end turns, and the borders of all added tokens, which no answer begins inside.

    Args:
        tokenizer: knows its added tokens; `<think>` and `<tool_call>` often are no special ones.

    Raises:
        UserError: a tokenizer that does not tell them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        decoder = tokenizer.added_tokens_decoder
        if not isinstance(decoder, dict):  # MistralCommonBackend's is a method that raises NotImplementedError
            raise UserError(
                f"the tokenizer of {tokenizer.name_or_path!r} ({type(tokenizer).__name__}) does not tell its added "
                "tokens, so no answer could be found in a conversation; give prompts and answers as texts and "
                "--prompt_template none"
            )
        added = list(decoder.values())
        special = {*(token.content for token in added if token.special), *tokenizer.all_special_tokens} - {""}
        self.specials = _longest_first(special)
        self.special = _any_of(self.specials)
        self.mark = re.compile(rf"\s*(?:{self.special.pattern})+")
        self._borders = _longest_first({*(token.content for token in added), *special} - {""})
        self._border = _any_of(self._borders)

    def ends(self, text: str, end: int | None = None) -> bool:
        """Whether the text up to `end` ends in a special token."""
        return text.endswith(self.specials, 0, end)

    def common_prefix(self, one: str, other: str) -> int:
        """Characters that both begin with, whole added tokens only."""
        low, high = 0, min(len(one), len(other))
        while low < high:
            middle = (low + high + 1) // 2
            if one[low:middle] == other[low:middle]:
                low = middle
            else:
                high = middle - 1
        longest = len(self._borders[0]) if self._borders else 0
        for text in (one, other):
            for token in self._border.finditer(text, max(0, low - longest), low + longest):
                if token.start() < low < token.end():
                    low = token.start()
        return low

    def through_mark(self, segment: str) -> int:
        """Characters of a turn through the special tokens that end it; all of them if none does.

        What a template writes after them (mostly a newline, or the mark of the whole conversation) is never generated.
        """
        end, left = len(segment), segment.rstrip()
        while left.endswith(self.specials):
            token = next(token for token in self.specials if left.endswith(token))
            end = len(left) - len(token)
            left = left[:end].rstrip()
        mark = self.mark.match(segment, end)
        return mark.end() if mark else len(segment)


def _longest_first(tokens: set[str]) -> tuple[str, ...]:
    return tuple(sorted(tokens, key=len, reverse=True))


def _any_of(tokens: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, tokens)))
