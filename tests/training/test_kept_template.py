"""What an adapter's tokenizer sends is what its run trained, whichever template wrote the prompts."""

import pytest
from transformers import AutoTokenizer

from comol_ds.adapters.kept_tokenizer import tokenizer_files, write_tokenizer_files
from comol_ds.data.prepare import prepare_data
from tests.data.data_helpers import settings, tiny_tokenizer, write_jsonl

ROWS = [{"instruction": f"Add {number} and 1.", "output": f"{number + 1}"} for number in range(12)]
TEMPLATE_FILE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ '[assistant]' if add_generation_prompt }}"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("wanted", "has_own"), [(None, True), (None, False), ("alpaca", True), ("file", True), ("file", False)]
)
def test_the_kept_tokenizer_asks_as_the_run_did(wanted, has_own, tmp_path):
    if wanted == "file":
        (tmp_path / "mine.jinja").write_text(TEMPLATE_FILE)
        wanted = str(tmp_path / "mine.jinja")
    tokenizer = tiny_tokenizer(chat=has_own)
    data = prepare_data(settings(write_jsonl(tmp_path / "x.jsonl", ROWS), prompt_template=wanted), tokenizer, seed=1)
    (tmp_path / "adapter").mkdir()
    write_tokenizer_files(tokenizer_files(tokenizer, data.template.chat_template), tmp_path / "adapter")
    kept = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    for record in data.train:
        asked = [{"role": "user", "content": ROWS[int(record["record_id"].split(":")[1]) - 1]["instruction"]}]
        sent = kept.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
        assert sent == record["input_ids"][: record["prompt_length"]]


def test_prompts_as_they_are_keep_no_template(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", ROWS)
    data = prepare_data(settings(path, prompt_template="none"), tiny_tokenizer(), seed=1)
    (tmp_path / "adapter").mkdir()
    write_tokenizer_files(tokenizer_files(tiny_tokenizer(), data.template.chat_template), tmp_path / "adapter")
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter").chat_template is None
