"""What a run trains of its data: the prompts that its template writes, and what the report says was left out."""

import json

import pytest

from comol_ds.data import token_cache
from comol_ds.data.prepare import prepare_data, validation_records
from comol_ds.data.tokenization import IGNORED
from comol_ds.errors import UserError
from tests.data import chat_templates as templates
from tests.data.chat_templates import chat_tokenizer
from tests.data.data_helpers import settings, sums, tiny_tokenizer, write_jsonl

QUESTIONS = [{"question": f"How many is {number}?", "answer": f"There are {number}."} for number in range(20)]
ALPACA_HEAD = "<s>Below is an instruction that describes a task. Write a response that appropriately completes the "


def prepare(path, tokenizer, **changes):
    return prepare_data(settings(path, **{"max_length": 256, "eval_dataset": [path], **changes}), tokenizer, 1)


def first_texts(data, tokenizer) -> tuple[str, str]:
    """Of the first training record: its prompt, and what the loss counts."""
    record = data.train[0]
    learned = [label for label in record["labels"] if label != IGNORED]
    return tokenizer.decode(record["input_ids"][: record["prompt_length"]]), tokenizer.decode(learned)


@pytest.fixture
def questions(tmp_path):
    return write_jsonl(tmp_path / "questions.jsonl", QUESTIONS)


def test_an_instruct_base_is_asked_in_its_own_words(questions, tmp_path):
    tokenizer = chat_tokenizer(templates.CHATML)
    prompt = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    data = prepare(questions, tokenizer)
    assert first_texts(data, tokenizer) == (prompt.format("How many is 0?"), "There are 0.<|im_end|>")
    assert (data.template.name, data.template.chat_template) == ("chat", templates.CHATML)
    assert data.report.summary().endswith("; prompt template chat")
    pairs = write_jsonl(tmp_path / "pairs.jsonl", sums(20))
    said = (prompt.format("How many is 0 and ?"), " There are 0.<|im_end|>")
    assert first_texts(prepare(pairs, tokenizer), tokenizer) == said


def test_a_plain_base_is_asked_in_alpacas_words_or_as_the_columns_are(questions, tmp_path):
    tokenizer = tiny_tokenizer(chat=False)
    prompt, answer = first_texts(prepare(questions, tokenizer), tokenizer)
    assert prompt == ALPACA_HEAD + "request.\n\n### Instruction:\nHow many is 0?\n\n### Response:\n"
    assert answer == "There are 0.</s>"
    pairs = write_jsonl(tmp_path / "pairs.jsonl", sums(20))
    assert first_texts(prepare(pairs, tokenizer), tokenizer) == ("<s>How many is 0 and ?", " There are 0.</s>")


def test_the_flag_decides_for_every_format(questions, tmp_path):
    tokenizer = chat_tokenizer(templates.CHATML)
    asked = prepare(questions, tokenizer, prompt_template="alpaca")
    assert first_texts(asked, tokenizer)[0].startswith(ALPACA_HEAD)
    literal = prepare(questions, tokenizer, prompt_template="none")
    assert first_texts(literal, tokenizer) == ("<s>How many is 0?", "There are 0.<|im_end|>")
    assert (literal.template.name, literal.template.chat_template) == ("none", None)
    path = tmp_path / "mine.jinja"
    path.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    mine = prepare(questions, tokenizer, prompt_template=str(path))
    assert first_texts(mine, tokenizer)[0] == "user: How many is 0?\nassistant:"
    assert mine.template.chat_template == path.read_text()


def test_validation_alone_is_written_as_in_the_run(questions):
    tokenizer = chat_tokenizer(templates.CHATML)
    for wanted in (None, "alpaca"):
        options = settings(questions, max_length=256, eval_dataset=[questions], prompt_template=wanted)
        assert (
            validation_records(options, tokenizer, 1).to_list() == prepare_data(options, tokenizer, 1).train.to_list()
        )


def test_a_kept_tokenizer_trains_the_same(questions):
    fresh, kept = tiny_tokenizer(chat=False), tiny_tokenizer(chat=False)
    data = prepare(questions, fresh)
    kept.chat_template = data.template.chat_template
    assert prepare(questions, kept).train.to_list() == data.train.to_list()


def test_the_cache_knows_the_template(questions, monkeypatch):
    built, real = [], token_cache._build
    monkeypatch.setattr(token_cache, "_build", lambda *args: (built.append(args), real(*args))[1])
    tokenizer = chat_tokenizer(templates.CHATML)
    for wanted in (None, "chat", "alpaca", "none", None, "alpaca"):
        prepare(questions, tokenizer, prompt_template=wanted)
    assert len(built) == 3


@pytest.mark.parametrize("streaming", [False, True])
def test_what_the_template_leaves_out_is_reported(tmp_path, streaming):
    turns = [
        {"role": "user", "content": "How many?"},
        {"role": "assistant", "content": "<think>Two sixes.</think>Twelve."},
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "Ten."},
    ]
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": turns}] * 3)
    report = prepare(path, chat_tokenizer(templates.QWEN3), streaming=streaming).report
    assert (report.unlabeled_turns, report.stripped_reasoning) == (3, 3)
    assert (
        "0 dropped without any label, 3 earlier answers without label since the chat template rewrites them, "
        "3 answers without their reasoning, which the chat template leaves out; 3 for " in report.summary()
    )
    whole = prepare(path, chat_tokenizer(templates.CHATML), streaming=streaming).report
    assert (whole.unlabeled_turns, whole.stripped_reasoning) == (0, 0) and "answers" not in whole.summary()


def test_columns_beside_an_instruction_reach_the_prompt_or_are_refused(tmp_path):
    row = {"instruction": "And now?", "input": "1 and 2", "output": "3", "system": "Be short."}
    row |= {"history": [["How many?", "Two."]]}
    path = write_jsonl(tmp_path / "x.jsonl", [row] * 3)
    tokenizer = chat_tokenizer(templates.CHATML)
    expected = (
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHow many?<|im_end|>\n"
        "<|im_start|>assistant\nTwo.<|im_end|>\n<|im_start|>user\nAnd now?\n\n1 and 2<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert first_texts(prepare(path, tokenizer), tokenizer) == (expected, "Two.<|im_end|>3<|im_end|>")
    with pytest.raises(UserError, match=r"x.jsonl row 1: column 'system' would be lost, since no chat template writes"):
        prepare(path, tokenizer, prompt_template="none")
    alpaca = first_texts(prepare(path, tokenizer, prompt_template="alpaca"), tokenizer)[0]
    asked = "### Instruction:\nAnd now?\n\n### Input:\n1 and 2\n\n### Response:\n"
    first = "<s>Be short.\n\n### Instruction:\nHow many?\n\n### Response:\nTwo.<|im_end|>\n\n"
    assert alpaca == first + asked


def test_tools_of_a_row_reach_the_prompt(tmp_path):
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    turns = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Two."}]
    rows = [{"messages": turns, "tools": tools} for tools in ([tool], json.dumps([tool]), None)]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    tokenizer = chat_tokenizer(templates.TOOLS)
    texts = [tokenizer.decode(ids) for ids in prepare(path, tokenizer).train["input_ids"]]
    with_tool = tokenizer.apply_chat_template(turns, tools=[tool], tokenize=False).removesuffix("\n")
    assert texts == [with_tool, with_tool, tokenizer.apply_chat_template(turns, tokenize=False).removesuffix("\n")]
