"""Which template writes a run's prompts: the default, the flag, a file, and what is refused."""

import pytest

from comol_ds.data.templates import resolve_template
from comol_ds.errors import UserError
from tests.data.data_helpers import CHAT_TEMPLATE, tiny_tokenizer

ALPACA_PLAIN = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd {them}.\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd {them}.\n\n### Input:\n1 and 2\n\n### Response:\n"
)
FORMATS = ("messages", "sharegpt", "alpaca", "question_answer", "prompt_completion")
USER = {"role": "user", "content": "Add {them}."}


def resolved(wanted=None, chat=True, formats=("alpaca",)):
    template = resolve_template(tiny_tokenizer(chat=chat), wanted, dict.fromkeys(formats, "x.jsonl"))
    return template.name, template.chat_template, {name for name in FORMATS if template.writes(name)}


def render(turns, tokenizer=None, add_generation_prompt=True):
    tokenizer = tokenizer or tiny_tokenizer()
    tokenizer.chat_template = resolve_template(tokenizer, "alpaca", {}).chat_template
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)


def test_a_tokenizer_with_a_chat_template_uses_it_for_every_format():
    assert resolved() == ("chat", CHAT_TEMPLATE, set(FORMATS))
    assert resolved("chat", formats=("messages",)) == ("chat", CHAT_TEMPLATE, set(FORMATS))


def test_without_one_instructions_are_written_as_alpacas_and_prompts_as_they_are():
    name, _, written = resolved(chat=False)
    assert (name, written) == ("alpaca", {"messages", "sharegpt", "alpaca", "question_answer"})
    assert resolved(chat=False, formats=("prompt_completion",))[:2] == ("none", None)


def test_the_flag_beats_the_tokenizers_own():
    name, alpaca, written = resolved("alpaca")
    assert (name, written) == ("alpaca", set(FORMATS)) and alpaca != CHAT_TEMPLATE
    assert resolved("none") == ("none", None, {"messages", "sharegpt"})


def test_a_kept_tokenizer_resolves_as_the_one_that_the_run_began_with():
    fresh, kept = tiny_tokenizer(chat=False), tiny_tokenizer(chat=False)
    kept.chat_template = resolve_template(fresh, None, {"alpaca": "x.jsonl"}).chat_template
    formats = dict.fromkeys(["alpaca", "prompt_completion"], "x.jsonl")
    assert resolve_template(kept, None, formats) == resolve_template(fresh, None, formats)


@pytest.mark.parametrize("adds", ["", "bos", "bos eos"])
def test_alpaca_prompts_are_stanfords_after_what_the_tokenizer_starts_with(adds):
    start = "<s>" if adds else ""
    assert render([USER], tiny_tokenizer(adds=adds)) == start + ALPACA_PLAIN
    given = render([USER | {"instruction": "Add {them}.", "input": "1 and 2"}], tiny_tokenizer(adds=adds))
    assert given == start + ALPACA_WITH_INPUT


def test_alpaca_prompts_with_system_and_history_end_every_answer_once():
    turns = [
        {"role": "system", "content": "Be short."},
        USER,
        {"role": "assistant", "content": "3"},
        USER,
        {"role": "assistant", "content": "4</s>"},
    ]
    asked = "### Instruction:\nAdd {them}.\n\n### Response:\n"
    assert render(turns, add_generation_prompt=False) == f"<s>Be short.\n\n{asked}3</s>\n\n{asked}4</s>"
    with pytest.raises(Exception, match="alpaca prompts have no role tool here"):
        render([USER, {"role": "tool", "content": "5"}])


def test_a_file_is_read_and_proven(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    assert resolved(str(path)) == (str(path), path.read_text(), set(FORMATS))
    for text, reason in (
        ("{% for m in messages %}", "is no usable chat template: "),
        ("Hello!", "does not write the content of a user's turn; loop over messages"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=f"mine.jinja {reason}"):
            resolved(str(path))
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"mine.jinja: not UTF-8 text; choose chat, alpaca, none, or"):
        resolved(str(path))
    with pytest.raises(UserError, match=r"--prompt_template chatml: No such file or directory; choose chat, alpaca"):
        resolved("chatml")


def test_chat_needs_a_template():
    with pytest.raises(UserError, match="--prompt_template chat: the tokenizer of 'tiny' has no chat template; use"):
        resolved("chat", chat=False)


@pytest.mark.parametrize("data_format", ["messages", "sharegpt"])
def test_conversations_need_one_that_was_not_guessed(data_format):
    for formats in ((data_format,), (data_format, "alpaca")):
        with pytest.raises(UserError) as error:
            resolved(chat=False, formats=formats)
        assert f"'x.jsonl' is in the {data_format} format, but the tokenizer of 'tiny' has no chat" in str(error.value)
        assert str(error.value).endswith("or give --prompt_template alpaca or a file in Jinja")
    with pytest.raises(UserError, match=f"in the {data_format} format, but --prompt_template none writes none"):
        resolved("none", formats=(data_format,))
    assert resolved("alpaca", chat=False, formats=(data_format,))[0] == "alpaca"
