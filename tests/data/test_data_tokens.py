"""Text to tokens: where the loss is, the end mark, the border between prompt and answer, what is cut."""

import json

import pytest

from comol_ds.data.token_ids import start_tokens
from comol_ds.data.tokenization import (
    IGNORED,
    RecordTokenizer,
    format_example,
    tokenizer_fingerprint,
)
from comol_ds.errors import UserError
from tests.data.data_helpers import tiny_tokenizer

BOS, EOS = 1, 2


def encode(prompt="How many?", completion="Twelve.", messages=None, tokenizer=None, max_length=128, **options):
    tokenizer = tokenizer or tiny_tokenizer()
    text = {"record_id": "x:1", "task": "t", "prompt": prompt, "completion": completion}
    text["conversation"] = "" if messages is None else json.dumps({"messages": messages})
    batch = RecordTokenizer(tokenizer, max_length, **options)({key: [value] for key, value in text.items()})
    return {key: values[0] for key, values in batch.items()}


def ids(text, tokenizer=None):
    return (tokenizer or tiny_tokenizer())(text, add_special_tokens=False)["input_ids"]


def trained_text(record, tokenizer=None):
    return (tokenizer or tiny_tokenizer()).decode([label for label in record["labels"] if label != IGNORED])


def test_loss_on_the_answer_and_its_end_only():
    record = encode()
    prompt, answer = ids("How many?"), ids("Twelve.")
    assert record["input_ids"] == [BOS, *prompt, *answer, EOS]
    assert record["labels"] == [IGNORED] * (1 + len(prompt)) + [*answer, EOS]
    assert record["prompt_length"] == 1 + len(prompt)
    assert record["trained_tokens"] == len(answer) + 1
    assert (record["reference"], record["truncated"]) == ("Twelve.", False)


def test_loss_on_everything_but_the_first_token_with_train_on_prompt():
    record = encode(train_on_prompt=True)
    assert record["labels"] == [IGNORED, *record["input_ids"][1:]]
    assert record["trained_tokens"] == record["length"] - 1


def test_border_is_exact_where_a_joint_tokenization_would_merge_across_it():
    prompt, completion = "the ca", "t sat"
    joint = ids(prompt + completion)
    record = encode(prompt, completion)
    assert joint != ids(prompt) + ids(completion), "the case must merge across the border"
    assert record["input_ids"][1 : record["prompt_length"]] == ids(prompt)
    assert trained_text(record) == "t sat</s>"


@pytest.mark.parametrize("adds", ["", "bos", "bos eos"])
def test_start_tokens_are_the_tokenizers_own_and_its_end_token_stays_out_of_the_middle(adds):
    tokenizer = tiny_tokenizer(adds=adds)
    expected = [BOS] if adds else []
    assert start_tokens(tokenizer) == expected
    record = encode(tokenizer=tokenizer)
    assert record["input_ids"] == [*expected, *ids("How many?"), *ids("Twelve."), EOS]


def test_a_cut_answer_has_no_end_mark_and_the_prompt_is_kept():
    whole = encode()
    for cut in range(1, len(ids("Twelve.")) + 1):
        record = encode(max_length=whole["length"] - cut)
        assert record["input_ids"] == whole["input_ids"][:-cut]
        assert record["labels"] == whole["labels"][:-cut]
        assert record["truncated"] and EOS not in record["input_ids"]
    assert not encode(max_length=whole["length"])["truncated"]


def test_a_prompt_that_fills_max_length_leaves_no_label():
    length = 1 + len(ids("How many?"))
    assert encode(max_length=length)["trained_tokens"] == 0
    assert encode(max_length=length + 1)["trained_tokens"] == 1
    kept = encode(max_length=length, train_on_prompt=True)
    assert kept["trained_tokens"] == length - 1


@pytest.mark.parametrize("completion", ["", "  \n"])
def test_an_empty_answer_has_no_label(completion):
    record = encode(completion=completion)
    assert record["trained_tokens"] == 0
    assert record["prompt_length"] == record["length"] == 1 + len(ids("How many?"))


def test_first_token_has_no_label_even_without_prompt_and_bos():
    record = encode("", "Twelve.", tokenizer=tiny_tokenizer(adds=""))
    assert record["labels"] == [IGNORED, *record["input_ids"][1:]]


@pytest.mark.parametrize("max_length", [2, 5, 7, 8, 9, 100])
def test_a_long_text_becomes_records_that_predict_every_token_once(max_length):
    tokenizer = tiny_tokenizer()
    whole = encode("", "one two three four five six seven")
    texts = {"record_id": ["x:1"], "task": ["t"], "prompt": [""], "completion": ["one two three four five six seven"]}
    parts = RecordTokenizer(tokenizer, max_length)(texts | {"conversation": [""]})
    count = len(parts["record_id"])
    assert count == max(1, -(-(whole["length"] - 1) // (max_length - 1)))
    assert parts["record_id"] == ["x:1", *(f"x:1.{number}" for number in range(2, count + 1))]
    assert max(parts["length"]) <= max_length and not any(parts["truncated"])
    assert [labels[0] for labels in parts["labels"]] == [IGNORED] * count
    assert [label for labels in parts["labels"] for label in labels[1:]] == whole["input_ids"][1:]
    joined = whole["input_ids"][:1] + [token for ids in parts["input_ids"] for token in ids[1:]]
    assert joined == whole["input_ids"]


CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "How many?"},
    {"role": "assistant", "content": "Twelve."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Ten."},
]


def test_chat_loss_on_assistant_turns_only():
    record = encode(messages=CHAT)
    assert trained_text(record) == "Twelve.</s>Ten.</s>"
    text = tiny_tokenizer().decode(record["input_ids"])
    assert text == tiny_tokenizer().apply_chat_template(CHAT, tokenize=False).removesuffix("\n")
    assert record["reference"] == "Ten."
    head = tiny_tokenizer().decode(record["input_ids"][: record["prompt_length"]])
    assert head == tiny_tokenizer().apply_chat_template(CHAT[:4], tokenize=False, add_generation_prompt=True)


def test_turns_after_the_last_answer_are_left_out():
    with_question = encode(messages=[*CHAT, {"role": "user", "content": "Why?"}])
    assert with_question["input_ids"] == encode(messages=CHAT)["input_ids"]


def test_a_chat_without_answer_has_no_label():
    assert encode(messages=CHAT[:2])["trained_tokens"] == 0


def test_template_that_rewrites_earlier_turns_trains_the_last_one():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' and not loop.last %}[old]{% endif %}"
        "<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    record = encode(messages=CHAT, tokenizer=tokenizer)
    assert trained_text(record) == "Ten.</s>"  # this template writes no end mark: it is appended


def test_template_problems_are_user_errors():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('Roles must\nalternate') }}"
    with pytest.raises(
        UserError, match=r"x:1: the chat template of 'tiny' refuses this record \(Roles must alternate\)"
    ):
        encode(messages=CHAT, tokenizer=tokenizer)
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match="does not write the last assistant turn after the ones before it"):
        encode(messages=CHAT, tokenizer=tokenizer)


def test_tokenizer_without_end_token_and_tiny_max_length():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="the tokenizer of 'tiny' has no eos_token"):
        RecordTokenizer(tokenizer, 128)
    with pytest.raises(UserError, match="max_length is 1; a record needs at least 2 tokens"):
        RecordTokenizer(tiny_tokenizer(), 1)


def test_a_tokenizer_that_writes_no_conversations_tokenizes_texts():
    def added_tokens_decoder(self):  # as MistralCommonBackend has it
        raise NotImplementedError

    tokenizer = tiny_tokenizer()
    tokenizer.__class__ = type("Texts", (type(tokenizer),), {"added_tokens_decoder": added_tokens_decoder})
    assert trained_text(encode(tokenizer=tokenizer)) == "Twelve.</s>"
    with pytest.raises(UserError, match=r"the tokenizer of 'tiny' \(Texts\) does not tell its added tokens"):
        encode(messages=CHAT, tokenizer=tokenizer)


def test_fingerprint_sees_what_changes_ids_and_nothing_else():
    reference = tokenizer_fingerprint(tiny_tokenizer())
    used = tiny_tokenizer()
    used(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(used) == reference
    more = tiny_tokenizer()
    more.add_tokens(["extra"])
    others = [more, tiny_tokenizer(adds=""), tiny_tokenizer(chat=False)]
    assert len({reference, *map(tokenizer_fingerprint, others)}) == 4


def test_example_shows_what_is_trained():
    shown = format_example(encode(), tiny_tokenizer())
    assert shown.endswith("\n<s>How many?[[Twelve.</s>]]")
    assert shown.startswith("record x:1, task t: ")
    assert "cut at the end" in format_example(encode(max_length=8), tiny_tokenizer())
