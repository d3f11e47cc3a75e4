"""What an answer is compared with is the text that was trained, not the raw column."""

import pytest

from comol_ds.data.batches import asked_records
from comol_ds.data.prepare import prepare_data
from comol_ds.evaluation.answers import ExactMatch
from tests.data.data_helpers import CHAT_TEMPLATE, settings, tiny_tokenizer, write_jsonl

# as Qwen3 does with an answer that has no reasoning of its own
THINKING = CHAT_TEMPLATE.replace(
    "{{ message['content'] }}",
    "{{ '<think>\\n\\n</think>\\n\\n' if message['role'] == 'assistant' }}{{ message['content'] | trim }}",
)


@pytest.mark.parametrize("max_length", [128, 45])  # 45 cuts answers
def test_the_reference_is_the_trained_answer_whole(max_length, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"question": f"How many is {i}?", "answer": f" There are {i}, one two three four. "} for i in range(12)]
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = THINKING
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    data = prepare_data(settings(path, validation_split_percentage=50, max_length=max_length), tokenizer, seed=1)
    assert len(asked_records(data.validation, None)) == 6
    for record in data.validation:
        number = int(record["record_id"].split(":")[1]) - 1
        assert record["reference"].strip() == f"<think>\n\n</think>\n\nThere are {number}, one two three four."
        trained = tokenizer.decode([label for label in record["labels"] if label != -100], skip_special_tokens=True)
        assert ExactMatch()(trained, record["reference"]) is not record["truncated"]
        assert record["truncated"] is (max_length == 45)
