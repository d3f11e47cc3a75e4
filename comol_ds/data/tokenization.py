"""From a text record to token ids and labels: where the loss is, where the end mark goes, what is cut.

Prompt and answer are tokenized apart. Tokenized together, a merge may cross the border (byte-level BPE joins "\\n" and
what follows), so no position separates what is given from what is learned; and in generation the model is given
exactly the ids of the prompt, which is what it must be trained on.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from comol_ds.data.token_ids import start_tokens
from comol_ds.errors import UserError, one_line

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
    }
)


@dataclass(frozen=True)
class Segment:
    """A piece of a record that is tokenized on its own; `answer` says that the model has to write it."""

    text: str
    answer: bool


class RecordTokenizer:
    """Turns batches of text records (`sources.TEXT_FEATURES`) into `TOKEN_FEATURES`; can be sent to processes.

    Per record: `input_ids` and `labels` of at most max_length tokens; `labels` is IGNORED where there is no loss and
    on the first token, which nothing predicts, so `trained_tokens` counts the positions that enter the loss;
    `prompt_length` is the number of tokens before the last answer, uncut; `reference` the text of that answer;
    `truncated` whether the end, or its end mark, was cut. A record with trained_tokens 0 is to be dropped.

    Args:
        tokenizer: any transformers tokenizer with an end-of-sequence token.
        max_length: longest record in tokens; what is beyond is cut from the end.
        train_on_prompt: put the loss on all tokens instead of the answers'.

    Raises:
        UserError: the tokenizer has no end-of-sequence token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, train_on_prompt: bool = False):
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
        self.start = start_tokens(tokenizer)

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """Tokenize columns of text records; all pieces in one call, which fast tokenizers do in parallel."""
        split, references = [], []
        for i, record_id in enumerate(batch["record_id"]):
            if batch["messages"][i]:
                turns = json.loads(batch["messages"][i])
                split.append(self._chat_segments(turns, record_id))
                references.append(_last_answer(turns))
            else:
                completion = batch["completion"][i]
                answer = [Segment(completion, True)] if completion.strip() else []
                split.append([Segment(batch["prompt"][i], False), *answer])
                references.append(completion)
        texts = [segment.text for segments in split for segment in segments]
        ids = iter(self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])
        rows = [
            self._join(segments, [next(ids) for _ in segments], is_chat=bool(messages))
            for segments, messages in zip(split, batch["messages"], strict=True)
        ]
        columns = {name: [row[name] for row in rows] for name in rows[0]} if rows else {}
        return {"record_id": batch["record_id"], "task": batch["task"], "reference": references, **columns}

    def _join(self, segments: list[Segment], pieces: list[list[int]], is_chat: bool) -> dict[str, Any]:
        # A chat template writes its own start tokens.
        ids = [] if is_chat else list(self.start)
        labels = [IGNORED] * len(ids)
        prompt_length = 0
        for segment, piece in zip(segments, pieces, strict=True):
            if segment.answer:
                prompt_length = len(ids)
                if segment is segments[-1]:
                    piece = self._with_end(piece, is_chat)
            ids += piece
            labels += piece if segment.answer or self.train_on_prompt else [IGNORED] * len(piece)
        if not segments or not segments[-1].answer:
            prompt_length = len(ids)
        truncated = len(ids) > self.max_length
        ids, labels = ids[: self.max_length], labels[: self.max_length]
        labels[:1] = [IGNORED] * len(labels[:1])
        return {
            "input_ids": ids,
            "labels": labels,
            "length": len(ids),
            "trained_tokens": sum(label != IGNORED for label in labels),
            "prompt_length": prompt_length,
            "truncated": truncated,
        }

    def _with_end(self, answer: list[int], is_chat: bool) -> list[int]:
        """The answer and its end mark, before any cut: a cut answer loses it and is not taught to stop there."""
        eos = self.tokenizer.eos_token_id
        if is_chat and eos in answer:
            # Templates may go on after the end mark, mostly with a newline that is never generated.
            return answer[: len(answer) - answer[::-1].index(eos)]
        return answer if answer[-1:] == [eos] else [*answer, eos]

    def _chat_segments(self, turns: list[dict[str, Any]], record_id: str) -> list[Segment]:
        """Cut the rendered chat into given and answered pieces.

        The span of an assistant turn is what the template adds between the chat up to that turn, with the generation
        prompt, and the chat including it. Some templates rewrite earlier turns (Qwen3 removes their reasoning): an
        earlier turn that cannot be placed gets no loss; the last one must be.
        """
        answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        if not answers or not _last_answer(turns).strip():
            return [Segment(self._render(turns, record_id), False)]
        last = answers[-1]
        whole = self._render(turns[: last + 1], record_id)
        segments, done = [], 0
        for i in answers:
            start = self._turn_start(turns[:i], whole, record_id)
            end = len(whole) if i == last else _length_if_prefix(self._render(turns[: i + 1], record_id), whole)
            if start is None or end is None:
                if i == last:
                    raise UserError(
                        f"{record_id}: the chat template of {self.tokenizer.name_or_path!r} does not write the last "
                        "assistant turn after the ones before it; use another template or the prompt_completion format"
                    )
                continue
            segments += [Segment(whole[done:start], False), Segment(whole[start:end], True)]
            done = end
        return [segment for segment in segments if segment.text]

    def _turn_start(self, before: list[dict[str, Any]], whole: str, record_id: str) -> int | None:
        if not before:
            return 0
        with_header = _length_if_prefix(self._render(before, record_id, add_generation_prompt=True), whole)
        return with_header if with_header is not None else _length_if_prefix(self._render(before, record_id), whole)

    def _render(self, turns: list[dict[str, Any]], record_id: str, add_generation_prompt: bool = False) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template may raise anything
            reason = one_line(error, limit=200)
            raise UserError(
                f"{record_id}: the chat template of {self.tokenizer.name_or_path!r} refuses this record ({reason}); "
                "change its turns or drop it"
            ) from error


def _length_if_prefix(head: str, whole: str) -> int | None:
    return len(head) if whole.startswith(head) else None


def _last_answer(turns: list[dict[str, Any]]) -> str:
    contents = [turn.get("content") for turn in turns if turn["role"] == "assistant"]
    if not contents or contents[-1] is None:
        return ""
    return contents[-1] if isinstance(contents[-1], str) else json.dumps(contents[-1], ensure_ascii=False)


def check_chat_template(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Raise UserError if the tokenizer cannot write chats."""
    if not tokenizer.chat_template:
        raise UserError(
            f"{where} is in the messages format, but the tokenizer of {tokenizer.name_or_path!r} has no chat template; "
            "use a chat model's tokenizer or data with prompt and completion"
        )


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
