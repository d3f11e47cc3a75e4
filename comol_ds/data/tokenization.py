"""From a text record to token ids and labels: where the loss is, where the end mark goes, what is cut.

A record is cut into pieces, what is given and what is learned, and tokenized piece by piece (`token_ids.piece_ids`). A
token that reached across the border would leave no position that separates the two; and in generation the model is
given exactly the ids of the prompt, which is what it must be trained on.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import datasets
from transformers import PreTrainedTokenizerBase

from comol_ds.data.chat import ChatRenderer, RenderedChat
from comol_ds.data.token_ids import piece_ids, start_tokens
from comol_ds.errors import UserError

IGNORED = -100  # the label without loss, as torch.nn.functional.cross_entropy and transformers have it

TOKEN_FEATURES = datasets.Features(
    {
        "record_id": datasets.Value("string"),
        "task": datasets.Value("string"),
        "input_ids": datasets.List(datasets.Value("int32")),
        "labels": datasets.List(datasets.Value("int32")),
        "length": datasets.Value("int32"),
        "trained_tokens": datasets.Value("int32"),
        "prompt_length": datasets.Value("int32"),
        "reference": datasets.Value("string"),
        "truncated": datasets.Value("bool"),
        "unlabeled_turns": datasets.Value("int32"),
        "stripped_reasoning": datasets.Value("int32"),
    }
)


@dataclass(frozen=True)
class Segment:
    """A piece of a record: given, an answer that the model learns, or one that it does not (weight 0)."""

    text: str
    kind: Literal["given", "learned", "unlearned"]


class RecordTokenizer:
    """Turns batches of text records (`sources.TEXT_FEATURES`) into `TOKEN_FEATURES`; can be sent to processes.

    Per record: `input_ids` and `labels` of at most max_length tokens; `labels` is IGNORED where there is no loss and
    on the first token, which nothing predicts, so `trained_tokens` counts the positions that enter the loss;
    `prompt_length` is the number of tokens before the last answer, uncut, and 0 where nothing is asked; `reference` the
    text of that answer, as it is decoded; `truncated` whether the end, or its end mark, was cut; `unlabeled_turns` and
    `stripped_reasoning` as `chat.RenderedChat` counts them. A record with trained_tokens 0 is to be dropped. A text
    without a prompt that is longer than max_length becomes several records, "<record id>.2" and so on.

    Args:
        tokenizer: any transformers tokenizer with an end-of-sequence token.
        max_length: longest record in tokens; what is beyond is cut from the end.
        train_on_prompt: put the loss on all tokens instead of the answers'.
        chat_template: writes conversations; None: the tokenizer's own.

    Raises:
        UserError: the tokenizer has no end-of-sequence token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        train_on_prompt: bool = False,
        chat_template: str | dict[str, str] | None = None,
    ):
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no eos_token, so no answer could end; "
                "set eos_token in its tokenizer_config.json"
            )
        if max_length < 2:
            raise UserError(f"max_length is {max_length}; a record needs at least 2 tokens")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.train_on_prompt = train_on_prompt
        self.chat_template = chat_template
        self.start = start_tokens(tokenizer)

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """Tokenize columns of text records; all pieces in one call, which fast tokenizers do in parallel."""
        chats = [
            self._rendered(conversation, record_id) if conversation else None
            for conversation, record_id in zip(batch["conversation"], batch["record_id"], strict=True)
        ]
        split = [
            _literal_segments(prompt, completion) if chat is None else _chat_segments(chat)
            for chat, prompt, completion in zip(chats, batch["prompt"], batch["completion"], strict=True)
        ]
        ids = piece_ids(self.tokenizer, [[segment.text for segment in segments] for segments in split])
        rows = [
            {"record_id": record_id, "task": task, **self._join(*parts)}
            for record_id, task, *parts in zip(batch["record_id"], batch["task"], split, ids, chats, strict=True)
        ]
        cut = [part for row in rows for part in self._cut(row)]
        return {name: [row[name] for row in cut] for name in TOKEN_FEATURES}

    @cached_property
    def _render(self) -> ChatRenderer:
        """Made for the first conversation: some tokenizers write none, and tokenize texts as any other."""
        return ChatRenderer(self.tokenizer, self.chat_template)

    def _rendered(self, conversation: str, record_id: str) -> RenderedChat:
        chat = self._render(json.loads(conversation), record_id)
        if self.train_on_prompt and chat.unplaced_untrained:
            raise UserError(
                f"{record_id}: the chat template rewrites a turn of weight 0, so --train_on_prompt would train it; "
                "drop the flag or the turn"
            )
        return chat

    def _join(self, segments: list[Segment], pieces: list[list[int]], chat: RenderedChat | None) -> dict[str, Any]:
        # A chat template writes its own start tokens.
        ids = list(self.start) if chat is None else []
        labels = [IGNORED] * len(ids)
        prompt_length, reference, is_asked = 0, "", False
        for segment, piece in zip(segments, pieces, strict=True):
            if segment.kind == "learned":
                prompt_length = len(ids) if is_asked else 0
                if segment is segments[-1]:
                    reference = self.tokenizer.decode(piece, skip_special_tokens=True) if is_asked else ""
                    piece = self._with_end(piece, chat)
            is_asked = is_asked or segment.kind == "given"
            has_loss = segment.kind == "learned" or (segment.kind == "given" and self.train_on_prompt)
            ids = ids + piece
            labels += piece if has_loss else [IGNORED] * len(piece)
        if not any(segment.kind == "learned" for segment in segments):
            prompt_length = len(ids)
        return {
            "input_ids": ids,
            "labels": labels,
            "prompt_length": prompt_length,
            "reference": reference,
            "unlabeled_turns": chat.unlabeled_turns if chat else 0,
            "stripped_reasoning": chat.stripped_reasoning if chat else 0,
        }

    def _cut(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """A record of at most max_length tokens; a text that nothing asks for, as many as it needs.

        The parts of a text overlap by one token, so that each token but the first is predicted once.
        """
        length = len(row["input_ids"])
        starts = range(0, max(1, length - 1), self.max_length - 1) if row["prompt_length"] == 0 else [0]
        parts = []
        for number, start in enumerate(starts, start=1):
            ids = row["input_ids"][start : start + self.max_length]
            labels = [IGNORED, *row["labels"][start + 1 : start + self.max_length]][: len(ids)]
            parts.append(
                row
                | {
                    "record_id": row["record_id"] if number == 1 else f"{row['record_id']}.{number}",
                    "input_ids": ids,
                    "labels": labels,
                    "length": len(ids),
                    "trained_tokens": sum(label != IGNORED for label in labels),
                    "truncated": start + len(ids) < length and start == starts[-1],
                }
            )
        return parts

    def _with_end(self, answer: list[int], chat: RenderedChat | None) -> list[int]:
        """The answer and its end mark, before any cut: a cut answer loses it and is not taught to stop there."""
        is_ended = answer[-1:] == [self.tokenizer.eos_token_id] if chat is None else chat.is_ended
        return answer if is_ended else [*answer, self.tokenizer.eos_token_id]


def _literal_segments(prompt: str, completion: str) -> list[Segment]:
    answer = [Segment(completion, "learned")] if completion.strip() else []
    return [Segment(prompt, "given"), *answer] if prompt else answer


def _chat_segments(chat: RenderedChat) -> list[Segment]:
    segments, done = [], 0
    for answer in chat.answers:
        segments += [
            Segment(chat.text[done : answer.start], "given"),
            Segment(chat.text[answer.start : answer.end], "learned" if answer.trained else "unlearned"),
        ]
        done = answer.end
    return [segment for segment in [*segments, Segment(chat.text[done:], "given")] if segment.text]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything that decides which ids a text gets, for the cache."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # Truncation and padding are left over from earlier calls and do not apply to ours.
        state = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    else:
        state = sorted(tokenizer.get_vocab().items())
    probe = tokenizer("A probe: 1 + 2 = 3,\n  two spaces.")["input_ids"]
    parts = [type(tokenizer).__name__, state, tokenizer.chat_template, tokenizer.eos_token_id, probe]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def format_example(record: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """One tokenized record for a human: its ids' text with [[ ]] around the parts that enter the loss."""
    text, run, inside = "", [], False
    for token, label in zip(record["input_ids"], record["labels"], strict=True):
        if (label != IGNORED) != inside:
            text += _part(run, inside, tokenizer)
            run, inside = [], label != IGNORED
        run.append(token)
    text += _part(run, inside, tokenizer)
    cut = ", cut at the end" if record["truncated"] else ""
    head = f"record {record['record_id']}, task {record['task']}: {record['length']} tokens"
    return f"{head}, {record['trained_tokens']} with loss in [[ ]]{cut}\n{text}"


def _part(run: list[int], inside: bool, tokenizer: PreTrainedTokenizerBase) -> str:
    text = tokenizer.decode(run) if run else ""
    return f"[[{text}]]" if inside else text


def first_line(ids: list[int], tokenizer: PreTrainedTokenizerBase, characters: int = 80) -> str:
    """The beginning of a record on one line, for error messages."""
    text = " ".join(tokenizer.decode(ids[:characters]).split())
    return text if len(text) <= characters else text[: characters - 3] + "..."
