"""One rendering of a conversation, and where its answers lie in it.

A conversation is rendered once, up to its last answer, as serving would render it. The span of an answer is what the
model has to write there: it begins where the generation prompt ends and reaches through the mark that ends the turn.
A template with {% generation %} markers says itself where answers lie; for others the same template, applied to the
turns before the answer and to the turns up to it, shows where the answer begins and ends. A template that rewrites
earlier turns (many strip their reasoning) leaves no place where such an answer could be learned as it is produced:
that turn has no span, and is counted.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from comol_ds.data.marks import Marks
from comol_ds.errors import UserError, one_line

_Rendering = TypeVar("_Rendering")
_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Fields in which data sets keep reasoning (transformers fills them from one another), and how it stands in a content.
_REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
_REASONING = re.compile(r"<think>(.*?)</think>", re.DOTALL)
# An answer whose first character stands in no template.
_LIKE_NO_PROMPT = "\N{REFERENCE MARK}"


@dataclass(frozen=True)
class Answer:
    """A span of the rendering, in characters; `trained` says that the loss counts it."""

    start: int
    end: int
    trained: bool


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as text up to the end of its last answer.

    Attributes:
        text: what the template wrote.
        answers: in order, without overlap.
        is_ended: the last answer reaches through a mark that ends the turn.
        unlabeled_turns: answers that have no span.
        stripped_reasoning: answers whose reasoning the template did not write.
        unplaced_untrained: answers of weight 0 that have no span.
    """

    text: str
    answers: tuple[Answer, ...] = ()
    is_ended: bool = False
    unlabeled_turns: int = 0
    stripped_reasoning: int = 0
    unplaced_untrained: int = 0


class ChatRenderer:
    """Renders conversations by a chat template and finds their answers.

    Args:
        tokenizer: knows the added tokens.
        chat_template: Jinja; named templates, or None: the tokenizer's own.

    Raises:
        UserError: the tokenizer does not tell its added tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | dict[str, str] | None):
        self.tokenizer = tokenizer
        self.chat_template = chat_template if isinstance(chat_template, str) else None
        self.marks = Marks(tokenizer)

    def __call__(self, conversation: dict[str, Any], record_id: str) -> RenderedChat:
        """Render one conversation.

        Args:
            conversation: {"messages": [...], "tools": [...], "options": {...}, "is_pair": true} as
                `formats.TextRecord` has it.
            record_id: for messages.

        Raises:
            UserError: the template refuses the record, loses its system turn or a tool, or does not write the last
                answer after the turns before it; or a prompt is written by a template already.
        """
        if conversation.get("is_pair"):
            self._check_unwritten(conversation["messages"], record_id)
        chat = _Chat(self, conversation, record_id)
        answers = [number for number, turn in enumerate(chat.turns) if _is_answer(turn)]
        trained = [number for number in answers if conversation["messages"][number].get("weight") != 0]
        said = [number for number, turn in enumerate(chat.turns) if turn["role"] != "assistant"]
        last = trained[-1] if trained else max([*answers, *said], default=-1)
        if last < 0:
            return RenderedChat("")
        text, marked = chat.write_marked(last + 1)
        chat.check_nothing_lost(text, last + 1)
        spans = {number: chat.span(number, last, text, marked) for number in answers if number <= last}
        if trained and spans[last] is None and last == 0:  # nobody asked for it
            return RenderedChat(text, unlabeled_turns=1)
        if trained and spans[last] is None:
            raise UserError(
                f"{record_id}: the chat template of {self.tokenizer.name_or_path!r} does not write the last "
                "assistant turn after the ones before it; use another template or the prompt_completion format"
            )
        placed = tuple(Answer(*span, number in trained) for number, span in spans.items() if span is not None)
        end = placed[-1].end if trained else len(text)
        return RenderedChat(
            text[:end],
            placed,
            is_ended=self.marks.ends(text, end),
            unlabeled_turns=sum(number in trained and span is None for number, span in spans.items()),
            stripped_reasoning=sum(_is_stripped(turn, text) for turn in chat.turns[: last + 1]),
            unplaced_untrained=sum(number not in trained and span is None for number, span in spans.items()),
        )

    def _check_unwritten(self, turns: list[dict[str, Any]], record_id: str) -> None:
        """Refuse to put a prompt into a template twice."""
        for turn in turns:
            begins_with = self.marks.special.match(turn["content"].lstrip())
            if turn["role"] == "user" and begins_with and begins_with.group():
                raise UserError(
                    f"{record_id}: the prompt begins with {begins_with.group()!r}: a chat template has written it "
                    "already; give --prompt_template none"
                )


class _Chat:
    """One conversation, to be written by the template as far as one asks."""

    def __init__(self, renderer: ChatRenderer, conversation: dict[str, Any], record_id: str):
        self.renderer = renderer
        self.turns = [{k: v for k, v in turn.items() if k != "weight"} for turn in conversation["messages"]]
        self.tools = conversation.get("tools")
        self.options = conversation.get("options", {})
        self.record_id = record_id
        if any("tool_calls" in turn for turn in self.turns) and not self._writes_arguments():
            self.turns = [_with_json_arguments(turn) for turn in self.turns]

    def write(self, count: int, add_generation_prompt: bool = False) -> str:
        """The first `count` turns as the template writes them."""
        return self._written(self.turns[:count], add_generation_prompt)

    def _written(self, turns: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        if not turns:
            return ""
        return self._refusable(
            lambda: self.renderer.tokenizer.apply_chat_template(
                turns,
                tools=self.tools,
                chat_template=self.renderer.chat_template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **self.options,
            )
        )

    def write_marked(self, count: int) -> tuple[str, dict[int, tuple[int, int]]]:
        """The first `count` turns, and turn -> the span that the template's own markers give it."""
        tokenizer = self.renderer.tokenizer
        template = self._refusable(lambda: tokenizer.get_chat_template(self.renderer.chat_template, self.tools))
        if not _MARKERS.search(template):
            return self.write(count), {}
        (text,), (spans,) = self._refusable(
            lambda: render_jinja_template(
                [self.turns[:count]],
                tools=self.tools,
                chat_template=template,
                return_assistant_tokens_mask=True,
                **{**tokenizer.special_tokens_map, **self.options},
            )
        )
        assistants = [number for number, turn in enumerate(self.turns[:count]) if turn["role"] == "assistant"]
        return text, dict(zip(assistants, spans, strict=True)) if len(assistants) == len(spans) else {}

    def span(self, number: int, last: int, text: str, marked: dict[int, tuple[int, int]]) -> tuple[int, int] | None:
        """Where the model writes a turn, of a text of `last` + 1 turns; None if the template rewrites it there."""
        begin = self._begin(number, text)
        if number in marked:
            start, end = marked[number]
            end += self._mark_after(text, marked, last, number)
            start = begin if begin is not None and start < begin < end else start
        else:
            end = len(text) if number == last else self._end(number, text)
            if begin is None or end is None or end <= begin:
                return None
            start = begin
        return start, start + self.renderer.marks.through_mark(text[start:end])

    def _begin(self, number: int, text: str) -> int | None:
        """Where the prompt for a turn ends."""
        prompt = self.write(number, add_generation_prompt=True) if number else self._first_prompt()
        if prompt is not None and text.startswith(prompt):
            return len(prompt)
        if number == 0:
            return None
        before = self.write(number)
        if not text.startswith(before):
            return None
        # The prompt goes on otherwise than the answer, as where it opens reasoning that the answer lacks.
        begin = self.renderer.marks.common_prefix(prompt, text)
        if (reasoning := _reasoning(self.turns[number])) and reasoning in text:
            return max(len(before), begin)
        # They may go on alike by chance (<think>, <html>): no answer begins later than one like no prompt does.
        other = [*self.turns[:number], {"role": "assistant", "content": _LIKE_NO_PROMPT}]
        return max(len(before), min(begin, self.renderer.marks.common_prefix(prompt, self._written(other))))

    def _first_prompt(self) -> str | None:
        """The prompt for an answer that nothing precedes; None where the template cannot write one."""
        tokenizer = self.renderer.tokenizer
        try:
            ((text,), _) = render_jinja_template(
                [[]],
                tools=self.tools,
                chat_template=tokenizer.get_chat_template(self.renderer.chat_template, self.tools),
                add_generation_prompt=True,
                **{**tokenizer.special_tokens_map, **self.options},
            )
        except Exception:  # most templates look at the first turn
            return None
        return text or None

    def _end(self, number: int, text: str) -> int | None:
        """Where a turn before the last ends, if it stands there as it was when it was the last."""
        as_last = self.write(number + 1)
        end = self.renderer.marks.common_prefix(as_last, text)
        # Marks may differ: one may end a conversation, another a turn.
        return None if self.renderer.marks.special.sub("", as_last[end:]).strip() else end

    def _mark_after(self, text: str, marked: dict[int, tuple[int, int]], last: int, number: int) -> int:
        """Characters of the mark that the template writes after a marked span which does not hold it."""
        end = marked[number][1]
        if self.renderer.marks.ends(text, end):
            return 0
        mark = self.renderer.marks.mark.match(text, marked[last][1])
        return len(mark.group()) if mark and text.startswith(mark.group(), end) else 0

    def check_nothing_lost(self, text: str, count: int) -> None:
        """Refuse a template that leaves out of `count` turns, without a word, what stands beside them."""
        name = self.renderer.tokenizer.name_or_path
        if self._loses_system(text, count):
            raise UserError(
                f"{self.record_id}: the chat template of {name!r} does not write the system turn; use another template "
                "or data without system turns"
            )
        for tool in self.tools or []:
            if tool["function"]["name"] not in text:
                raise UserError(
                    f"{self.record_id}: the chat template of {name!r} does not write the tool "
                    f"{tool['function']['name']!r}; use another template, or leave them out with --columns tools="
                )

    def _loses_system(self, text: str, count: int) -> bool:
        """Whether a system turn changes nothing; a template may write it otherwise than it stands, or follow it."""
        first = self.turns[0]
        if first["role"] != "system" or first.get("content", "").strip() in text:
            return False
        try:
            return self._written(self.turns[1:count]) == text
        except UserError:
            return False

    def _writes_arguments(self) -> bool:
        """Whether the template writes parsed arguments; one that joins them to a text wants them as JSON."""
        try:
            text = self.write(len(self.turns))
        except UserError:
            return False
        arguments = [call["function"]["arguments"] for turn in self.turns for call in turn.get("tool_calls", [])]
        return not any(str(given) in text for given in arguments if str(given) != json.dumps(given))

    def _refusable(self, render: Callable[[], _Rendering]) -> _Rendering:
        try:
            return render()
        except Exception as error:  # a template may raise anything
            reason = one_line(error, limit=200)
            raise UserError(
                f"{self.record_id}: the chat template of {self.renderer.tokenizer.name_or_path!r} refuses this record "
                f"({reason}); change its turns or drop it"
            ) from error


def _with_json_arguments(turn: dict[str, Any]) -> dict[str, Any]:
    if "tool_calls" not in turn:
        return turn
    calls = [
        {
            **call,
            "function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)},
        }
        for call in turn["tool_calls"]
    ]
    return {**turn, "tool_calls": calls}


def _is_answer(turn: dict[str, Any]) -> bool:
    """Whether the model says something in this turn."""
    said = turn.get("content", "").strip() or turn.get("tool_calls") or _reasoning(turn)
    return turn["role"] == "assistant" and bool(said)


def _reasoning(turn: dict[str, Any]) -> str:
    """The reasoning of a turn, from a field of its own or from its content."""
    fields = (turn.get(name) for name in _REASONING_FIELDS)
    inside = _REASONING.search(turn.get("content", ""))
    text = next((field for field in fields if isinstance(field, str)), inside.group(1) if inside else "")
    return text.strip()


def _is_stripped(turn: dict[str, Any], text: str) -> bool:
    return turn["role"] == "assistant" and _reasoning(turn) not in text
