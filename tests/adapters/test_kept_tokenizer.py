"""The tokenizer beside an adapter: what is written, and that it says what the run's did."""

import pytest
from transformers import AutoTokenizer

from comol_ds.adapters.kept_tokenizer import (
    has_tokenizer,
    read_tokenizer_files,
    tokenizer_files,
    write_tokenizer_files,
)
from tests.data.data_helpers import CHAT_TEMPLATE, tiny_tokenizer

OTHER = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
TURNS = [{"role": "user", "content": "How many?"}]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, OTHER, {"default": OTHER, "tool_use": CHAT_TEMPLATE}])
def test_a_kept_tokenizer_writes_the_same_prompts(template, tmp_path):
    tokenizer = tiny_tokenizer()
    write_tokenizer_files(tokenizer_files(tokenizer, template), tmp_path)
    assert tokenizer.chat_template == CHAT_TEMPLATE, "the tokenizer itself is left as it is"
    kept = AutoTokenizer.from_pretrained(tmp_path)
    assert has_tokenizer(tmp_path) and kept.chat_template == template
    tokenizer.chat_template = template
    assert kept.apply_chat_template(TURNS)["input_ids"] == tokenizer.apply_chat_template(TURNS)["input_ids"]
    assert (kept("a b").input_ids, kept.pad_token_id) == (tokenizer("a b").input_ids, tokenizer.pad_token_id)
    assert read_tokenizer_files(tmp_path) == tokenizer_files(tokenizer, template)


def test_without_a_template_there_is_none(tmp_path):
    for template in ({"default": OTHER, "tool_use": CHAT_TEMPLATE}, None):  # the second takes the place of the first
        write_tokenizer_files(tokenizer_files(tiny_tokenizer(), template), tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template is None


def test_the_files_do_not_depend_on_earlier_calls():
    fresh, used = tiny_tokenizer(), tiny_tokenizer()
    used(["a", "a b c d"], padding=True, truncation=True, max_length=3)
    assert tokenizer_files(used, OTHER) == tokenizer_files(fresh, OTHER)


def test_a_link_to_another_folders_file_is_replaced_not_written_into(tmp_path):
    base, folder = tmp_path / "base.json", tmp_path / "export"
    base.write_text("the base's own")
    folder.mkdir()
    (folder / "tokenizer.json").hardlink_to(base)
    write_tokenizer_files(tokenizer_files(tiny_tokenizer(), None), folder)
    assert base.read_text() == "the base's own" != (folder / "tokenizer.json").read_text()


def test_vocabularies_and_code_of_its_own_are_the_tokenizer_s(tmp_path):
    kept = ["tekken.json", "tokenization_mine.py", "tokenizer_config.json"]
    for name in [*kept, "modeling_mine.py", "config.json"]:
        (tmp_path / name).write_text("")
    assert sorted(read_tokenizer_files(tmp_path)) == kept


def test_nothing_is_written_without_a_tokenizer(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("mine")
    write_tokenizer_files({}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["chat_template.jinja"] and not has_tokenizer(tmp_path)
