"""Which prompts a run trains: the chat template that writes its conversations, or none.

Every way of asking is a chat template in Jinja, the format that transformers, vLLM and SGLang render: a tokenizer with
`PromptTemplate.chat_template` as its chat template sends the prompts that were trained.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from comol_ds.data.token_ids import start_tokens
from comol_ds.errors import UserError, one_line

# What rows of a format are; an instruction without a chat template is written as Alpaca's.
_CONVERSATIONS = frozenset({"messages", "sharegpt"})
_INSTRUCTIONS = frozenset({"alpaca", "question_answer"})
_PAIRS = frozenset({"prompt_completion"})
_TEXTS = frozenset({"text"})
# The prompts of Stanford Alpaca (https://github.com/tatsu-lab/stanford_alpaca#data-release).
_ALPACA_FILE = Path(__file__).with_name("alpaca.jinja")


@dataclass(frozen=True)
class PromptTemplate:
    """How a run writes its prompts.

    Attributes:
        name: "chat" (the tokenizer's own template), "alpaca", "none" (the columns as they are), or the path of a file.
        chat_template: Jinja, or named templates in Jinja, as `tokenizer.chat_template` has it; None with "none".
        literal: formats whose rows are not put as a conversation: prompt and answer follow each other as they are.
        unasked: formats of the run's data that are no conversations and become ones only because the tokenizer has a
            chat template.
    """

    name: str
    chat_template: str | dict[str, str] | None
    literal: frozenset[str] = _TEXTS
    unasked: frozenset[str] = frozenset()

    def writes(self, data_format: str) -> bool:
        """Whether rows of this format are conversations that the chat template writes."""
        return data_format not in self.literal


def resolve_template(
    tokenizer: PreTrainedTokenizerBase, wanted: str | None, data_formats: Mapping[str, str]
) -> PromptTemplate:
    """The template of a run.

    Without a wish, a tokenizer that has a chat template uses it for every format. One that has none writes
    instructions as Alpaca's prompts, and a prompt with its completion as they are.

    Args:
        tokenizer: the base model's, or the one that a run has kept with its template.
        wanted: "chat", "alpaca", "none", a file in Jinja, or None.
        data_formats: the formats of the run's data, keys of `formats.FORMATS`, each with a path, for messages.

    Raises:
        UserError: a chat template is needed and there is none, or the file is none.
    """
    alpaca = _start_text(tokenizer) + _ALPACA_FILE.read_text(encoding="utf-8")
    has_own = bool(tokenizer.chat_template) and tokenizer.chat_template != alpaca
    if wanted is None:
        if has_own:
            unasked = (_INSTRUCTIONS | _PAIRS) & set(data_formats)
            return PromptTemplate("chat", tokenizer.chat_template, unasked=unasked)
        _refuse_conversations(
            data_formats,
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; use a chat model's tokenizer",
        )
        if _INSTRUCTIONS & set(data_formats):
            return PromptTemplate("alpaca", alpaca, _PAIRS | _TEXTS)
        return PromptTemplate("none", None, _PAIRS | _TEXTS)
    if wanted == "chat":
        if not tokenizer.chat_template:
            raise UserError(
                f"--prompt_template chat: the tokenizer of {tokenizer.name_or_path!r} has no chat template; "
                "use alpaca, none, or a file in Jinja"
            )
        return PromptTemplate("chat", tokenizer.chat_template)
    if wanted == "alpaca":
        return PromptTemplate("alpaca", alpaca)
    if wanted == "none":
        _refuse_conversations(data_formats, "--prompt_template none writes none; drop it")
        return PromptTemplate("none", None, _INSTRUCTIONS | _PAIRS | _TEXTS)
    return PromptTemplate(wanted, _read_template(wanted, tokenizer))


def _refuse_conversations(data_formats: Mapping[str, str], why: str) -> None:
    for data_format in _CONVERSATIONS & set(data_formats):
        raise UserError(
            f"data set {data_formats[data_format]!r} is in the {data_format} format, but {why}, or give "
            "--prompt_template alpaca or a file in Jinja"
        )


def _read_template(path: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A chat template from a file, proven by one conversation."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(
            f"--prompt_template {path}: {reason}; choose chat, alpaca, none, or a chat template's file in Jinja"
        ) from error
    try:
        written = tokenizer.apply_chat_template(
            [{"role": "user", "content": "probe"}], chat_template=text, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template may raise anything
        raise UserError(f"--prompt_template {path} is no usable chat template: {one_line(error, limit=200)}") from error
    if "probe" not in written:
        raise UserError(f"--prompt_template {path} does not write the content of a user's turn; loop over messages")
    return text


def _start_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the tokenizer puts before a text by itself (its BOS, if it adds one), in Jinja."""
    tokens = tokenizer.convert_ids_to_tokens(start_tokens(tokenizer))
    return "".join("{{ '" + token.replace("\\", "\\\\").replace("'", "\\'") + "' }}" for token in tokens)
