"""Conversations: one rendering, as serving would send it, and the loss on what the model would write there."""

import json
import time

import pytest

from comol_ds.data.marks import Marks
from comol_ds.data.tokenization import IGNORED, RecordTokenizer
from comol_ds.errors import UserError
from tests.data import chat_templates as templates
from tests.data.chat_templates import chat_tokenizer

ASK, SAY, AGAIN, LAST = (
    {"role": "user", "content": "How many?"},
    {"role": "assistant", "content": "Twelve."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Ten."},
)
CHAT = [ASK, SAY, AGAIN, LAST]


def encode(tokenizer, turns, max_length=512, train_on_prompt=False, **beside):
    conversation = json.dumps({"messages": turns, **beside})
    texts = {"record_id": ["x:1"], "task": ["t"], "prompt": [""], "completion": [""], "conversation": [conversation]}
    batch = RecordTokenizer(tokenizer, max_length, train_on_prompt)(texts)
    return {key: values[0] for key, values in batch.items()}


def learned(tokenizer, record) -> list[str]:
    """The texts of the labeled stretches."""
    stretches, inside = [], False
    for label in record["labels"]:
        if label != IGNORED:
            stretches = [*stretches[:-1], [*stretches[-1], label]] if inside else [*stretches, [label]]
        inside = label != IGNORED
    return [tokenizer.decode(ids) for ids in stretches]


def served(tokenizer, turns, **options) -> list[int]:
    """The ids that a server makes of a conversation."""
    return tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False, **options)


EVERY_ANSWER = {
    templates.CHATML: ["Twelve.<|im_end|>", "Ten.<|im_end|>"],
    templates.LLAMA3: ["Twelve.<|eot_id|>", "Ten.<|eot_id|>"],
    templates.GEMMA: ["Twelve.<end_of_turn>", "Ten.<end_of_turn>"],
    templates.MISTRAL: [" Twelve.</s>", " Ten.</s>"],
    templates.QWEN3: ["<think>\n\n</think>\n\nTen.<|im_end|>"],
    templates.DEEPSEEK: ["Twelve.</s>", "Ten.</s>"],
    templates.PHI35: ["Twelve.<|end|>", "Ten.<|end|>"],
    templates.GPT_OSS: ["<|channel|>final<|message|>Twelve.", "<|channel|>final<|message|>Ten.<|return|>"],
    templates.MARKED: ["Twelve.<|im_end|>", "Ten.<|im_end|>"],
    templates.PLAIN: ["Twelve.\n", "Ten.\n</s>"],
}


@pytest.mark.parametrize("adds", ["", "bos"])
@pytest.mark.parametrize("template", EVERY_ANSWER)
def test_every_answer_that_stands_as_it_was_produced_is_learned_through_its_end_mark(template, adds):
    tokenizer = chat_tokenizer(template, adds=adds)
    record = encode(tokenizer, CHAT)
    assert learned(tokenizer, record) == EVERY_ANSWER[template]
    assert record["unlabeled_turns"] == 2 - len(EVERY_ANSWER[template])
    assert record["stripped_reasoning"] == 0
    # The ids are those of the one rendering, and the prompt's those that a server sends for the last answer.
    ids = record["input_ids"][:-1] if template == templates.PLAIN else record["input_ids"]
    assert served(tokenizer, CHAT)[: len(ids)] == ids
    prompt = record["input_ids"][: record["prompt_length"]]
    asked = served(tokenizer, CHAT[:3], add_generation_prompt=True)
    if template == templates.DEEPSEEK:  # whose prompt opens a reasoning that these answers do not have
        asked = asked[: len(prompt)]
    assert prompt == asked
    assert record["reference"] == tokenizer.decode(
        record["labels"][record["prompt_length"] :], skip_special_tokens=True
    )


@pytest.mark.parametrize("template", EVERY_ANSWER)
def test_train_on_prompt_labels_all_but_the_first_token(template):
    record = encode(chat_tokenizer(template), CHAT, train_on_prompt=True)
    assert record["labels"] == [IGNORED, *record["input_ids"][1:]]


REASONED = [
    ASK,
    SAY | {"content": "<think>\nTwo sixes.\n</think>\n\nTwelve."},
    AGAIN,
    LAST | {"content": "<think>\nTwo fives.\n</think>\n\nTen."},
]


@pytest.mark.parametrize(
    ("template", "answers", "unlabeled", "stripped"),
    [
        (templates.QWEN3, ["<think>\nTwo fives.\n</think>\n\nTen.<|im_end|>"], 1, 1),
        (templates.DEEPSEEK, ["Twelve.</s>", "Ten.</s>"], 0, 2),
        (
            templates.CHATML,
            ["<think>\nTwo sixes.\n</think>\n\nTwelve.<|im_end|>", "<think>\nTwo fives.\n</think>\n\nTen.<|im_end|>"],
            0,
            0,
        ),
    ],
)
def test_reasoning_that_a_template_leaves_out_is_counted(template, answers, unlabeled, stripped):
    tokenizer = chat_tokenizer(template)
    record = encode(tokenizer, REASONED)
    assert learned(tokenizer, record) == answers
    assert (record["unlabeled_turns"], record["stripped_reasoning"]) == (unlabeled, stripped)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_in_a_field_is_learned_or_counted(field):
    turns = [ASK, SAY, AGAIN, LAST | {field: "Two fives."}]
    tokenizer = chat_tokenizer(templates.GPT_OSS)
    analysis = "<|channel|>analysis<|message|>Two fives.<|end|><|start|>assistant"
    expected = [EVERY_ANSWER[templates.GPT_OSS][0], f"{analysis}<|channel|>final<|message|>Ten.<|return|>"]
    assert learned(tokenizer, encode(tokenizer, turns)) == expected
    assert encode(chat_tokenizer(templates.CHATML), turns)["stripped_reasoning"] == 1


@pytest.mark.parametrize("added", [(), ("<think>",), ("<think>", "</think>", "<tool_call>")])
@pytest.mark.parametrize("answer", ["<tool_call>add</tool_call>", "<html>", "<thin", "Ten."])
@pytest.mark.parametrize(("template", "head"), [(templates.CHATML, "assistant\n"), (templates.PLAIN, "assistant: ")])
def test_an_answer_that_begins_as_the_prompt_goes_on_is_learned_from_its_first_character(template, head, answer, added):
    tokenizer = chat_tokenizer(template)
    tokenizer.add_tokens(list(added))  # as Qwen 3 has them: added, and not special
    tokenizer.chat_template = template.replace(f"{head}' }}}}{{% endif %}}", f"{head}<think>\n' }}}}{{% endif %}}")
    assert tokenizer.chat_template != template
    record = encode(tokenizer, [ASK, SAY | {"content": answer}, AGAIN, LAST | {"content": answer}])
    ends = ["<|im_end|>"] * 2 if template == templates.CHATML else ["\n", "\n</s>"]
    assert learned(tokenizer, record) == [answer + end for end in ends]


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 5, "b": 5}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def test_a_tool_call_is_learned_and_a_last_one_does_not_unlabel_the_record():
    tokenizer = chat_tokenizer(templates.TOOLS)
    call = {"role": "assistant", "tool_calls": [CALL]}
    called = '<tool_call>add {"a": 5, "b": 5}</tool_call><|im_end|>'
    record = encode(tokenizer, [ASK, SAY, AGAIN, call], tools=[TOOL])
    assert learned(tokenizer, record) == ["Twelve.<|im_end|>", called]
    assert served(tokenizer, [ASK, SAY, AGAIN, call], tools=[TOOL])[:-1] == record["input_ids"]
    record = encode(tokenizer, [ASK, call, {"role": "tool", "content": "10"}, LAST], tools=[TOOL])
    assert learned(tokenizer, record) == [called, "Ten.<|im_end|>"]


@pytest.mark.parametrize("content", ["", " \n"])
def test_an_empty_last_turn_does_not_unlabel_the_record(content):
    tokenizer = chat_tokenizer(templates.CHATML)
    record = encode(tokenizer, [ASK, SAY, AGAIN, LAST | {"content": content}])
    assert record["input_ids"] == encode(tokenizer, [ASK, SAY])["input_ids"]
    record = encode(tokenizer, [ASK, SAY | {"content": content}])
    assert record["trained_tokens"] == 0
    assert record["input_ids"] == served(tokenizer, [ASK])
    assert encode(tokenizer, [SAY | {"content": content}])["length"] == 0


def test_a_first_turn_of_the_assistant_is_learned_behind_its_prompt_or_not_at_all():
    tokenizer = chat_tokenizer(templates.CHATML)
    assert learned(tokenizer, encode(tokenizer, [SAY, AGAIN, LAST])) == ["Twelve.<|im_end|>", "Ten.<|im_end|>"]
    tokenizer.chat_template = (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are kind.<|im_end|>\n{% endif %}"
        + templates.CHATML
    )
    record = encode(tokenizer, [SAY, AGAIN, LAST])
    assert (learned(tokenizer, record), record["unlabeled_turns"]) == (["Ten.<|im_end|>"], 1)
    alone = encode(tokenizer, [SAY])
    assert (alone["trained_tokens"], alone["unlabeled_turns"]) == (0, 1)


def test_a_prompt_that_a_template_has_written_is_not_written_again():
    tokenizer = chat_tokenizer(templates.CHATML)
    written = [{"role": "user", "content": " <|im_start|>user\nHow many?<|im_end|>"}, SAY]
    with pytest.raises(
        UserError, match=r"x:1: the prompt begins with '<\|im_start\|>': a chat template has written it"
    ):
        encode(tokenizer, written, is_pair=True)
    assert encode(tokenizer, written)["trained_tokens"] > 0
    assert encode(tokenizer, [ASK | {"content": "What is <|im_end|>?"}, SAY], is_pair=True)["trained_tokens"] > 0


def test_turns_of_weight_0_are_given_and_not_learned():
    tokenizer = chat_tokenizer(templates.CHATML)
    unlearned = [ASK, SAY | {"weight": 0}, AGAIN, LAST]
    record = encode(tokenizer, unlearned)
    assert record["input_ids"] == encode(tokenizer, CHAT)["input_ids"]
    assert learned(tokenizer, record) == ["Ten.<|im_end|>"]
    everything = encode(tokenizer, unlearned, train_on_prompt=True)
    dropped = [i for i, label in enumerate(everything["labels"]) if label == IGNORED]
    assert tokenizer.decode([everything["input_ids"][i] for i in dropped[1:]]) == "Twelve.<|im_end|>"
    assert encode(tokenizer, [ASK, SAY, AGAIN, LAST | {"weight": 0}]) == encode(tokenizer, [ASK, SAY])
    assert encode(tokenizer, [ASK, SAY | {"weight": 0}])["trained_tokens"] == 0
    for turns in ([ASK, SAY | {"weight": 0}], [ASK, SAY | {"weight": 0}, AGAIN]):
        alone = encode(tokenizer, turns, train_on_prompt=True)
        dropped = [i for i, label in enumerate(alone["labels"]) if label == IGNORED]
        assert tokenizer.decode([alone["input_ids"][i] for i in dropped[1:]]) == "Twelve.<|im_end|>"
        assert alone["input_ids"] == served(tokenizer, turns)
    for turns in (unlearned, [ASK, SAY | {"weight": 0}, AGAIN, LAST | {"weight": 0}]):
        with pytest.raises(UserError, match="x:1: the chat template rewrites a turn of weight 0, so --train_on_prompt"):
            encode(chat_tokenizer(templates.QWEN3), turns, train_on_prompt=True)


def test_what_a_template_loses_without_a_word_is_refused_by_name():
    tokenizer = chat_tokenizer(templates.CHATML)
    with pytest.raises(UserError, match="x:1: the chat template of 'tiny' does not write the tool 'add'; use another"):
        encode(tokenizer, CHAT, tools=[TOOL])
    tokenizer.chat_template = "{% for m in messages if m.role != 'system' %}{{ m.content }}</s>{% endfor %}"
    with pytest.raises(UserError, match="x:1: the chat template of 'tiny' does not write the system turn; use another"):
        encode(tokenizer, [{"role": "system", "content": "Be short."}, *CHAT])


@pytest.mark.parametrize(
    "written",
    ["m.content | replace('\\n', ' ')", "('fast' if '/no_think' in m.content else 'slow')", "m.content | upper"],
)
def test_a_system_turn_that_a_template_follows_or_writes_otherwise_is_not_lost(written):
    tokenizer = chat_tokenizer(templates.CHATML)
    system = {"role": "system", "content": "Be short.\n/no_think"}
    wrapped = f"{{% if m.role == 'system' %}}{{{{ {written} }}}}{{% elif m.content %}}"
    tokenizer.chat_template = templates.CHATML.replace("{% if m.content %}", wrapped)
    record = encode(tokenizer, [system, *CHAT])
    assert learned(tokenizer, record) == EVERY_ANSWER[templates.CHATML]
    assert record["input_ids"] == served(tokenizer, [system, *CHAT])[:-1]


@pytest.mark.parametrize("written", ["call.function.arguments", "('' + call.function.arguments)"])
def test_arguments_reach_templates_that_join_them_to_a_text(written):
    tokenizer = chat_tokenizer(templates.CHATML)
    tokenizer.chat_template = templates.CHATML.replace("(call.function.arguments | tojson)", written)
    record = encode(tokenizer, [ASK, {"role": "assistant", "tool_calls": [CALL]}])
    assert learned(tokenizer, record) == ['<tool_call>add {"a": 5, "b": 5}</tool_call><|im_end|>']


def test_a_rows_own_variables_reach_the_template():
    tokenizer = chat_tokenizer(templates.CHATML)
    tokenizer.chat_template = "{{ date }}" + templates.CHATML
    record = encode(tokenizer, CHAT, options={"date": "today"})
    assert record["input_ids"] == served(tokenizer, CHAT, date="today")[:-1]
    assert tokenizer.decode(record["input_ids"]).startswith("today<|im_start|>")


def test_named_templates_are_chosen_as_serving_chooses_them():
    tokenizer = chat_tokenizer(templates.TOOLS)
    tokenizer.chat_template = {"default": templates.CHATML, "tool_use": templates.TOOLS}
    assert encode(tokenizer, CHAT, tools=[TOOL])["input_ids"] == served(tokenizer, CHAT, tools=[TOOL])[:-1]
    assert encode(tokenizer, CHAT)["input_ids"] == served(tokenizer, CHAT)[:-1]
    tokenizer.chat_template = {"rag": templates.CHATML, "tool_use": templates.TOOLS}
    with pytest.raises(
        UserError, match=r"x:1: the chat template of 'tiny' refuses this record \(This model has multiple"
    ):
        encode(tokenizer, CHAT)


def test_a_common_beginning_ends_before_a_token_that_one_of_both_goes_on_with():
    tokenizer = chat_tokenizer(templates.CHATML)
    assert Marks(tokenizer).common_prefix("a\n<think>", "a\n<thin") == len("a\n<thin")
    tokenizer.add_tokens(["<think>"])
    marks = Marks(tokenizer)
    assert marks.common_prefix("a\n<think>", "a\n<thin") == marks.common_prefix("a\n<thin", "a\n<think>") == 2
    assert marks.special.search("<think>") is None, "it ends no turn"


def test_a_turn_is_copied_once_whatever_the_number_of_special_tokens():
    tokenizer = chat_tokenizer(templates.CHATML)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|reserved_{number}|>" for number in range(3000)]})
    marks, turn = Marks(tokenizer), "a" * 2_000_000 + " <|im_end|>\n"
    start = time.process_time()
    assert marks.through_mark(turn) == len(turn) - 1
    assert time.process_time() - start < 0.2, "a copy for each takes over a second"
