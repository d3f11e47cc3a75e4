"""The demo's base model: it loads offline, is small, knows its world's text and none of the tasks."""

import itertools
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from comol_ds.demo import DATA_DIR, DEFAULTS, MODEL_DIR, TEST_FILE
from comol_ds.demo.corpus import stories
from comol_ds.demo.pretrain import HELD_OUT_SEED, TRAIN_SEED, held_out_loss, new_model, train_tokenizer
from comol_ds.demo.tasks import TASKS


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR).eval()


@pytest.fixture(scope="module")
def records():
    return [json.loads(line) for path in sorted(DATA_DIR.glob("*.jsonl")) for line in path.open(encoding="utf-8")]


def test_folder_is_small():
    assert sum(path.stat().st_size for path in MODEL_DIR.iterdir()) < 6_000_000


def test_committed_tokenizer_is_the_scripts(tokenizer):
    assert train_tokenizer().backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_committed_model_has_the_scripts_shape(tokenizer, model):
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in new_model(tokenizer).named_parameters()
    }
    assert model.dtype == torch.float32


def test_special_tokens_are_distinct_and_agree(tokenizer, model):
    special = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id
    assert len(set(special)) == 4 and None not in special
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == special[:3]


def test_tokenizer_round_trips_every_record(tokenizer, records):
    for record in records:
        prompt, completion = (tokenizer(record[part])["input_ids"] for part in ("prompt", "completion"))
        text = record["prompt"] + record["completion"]
        assert prompt + completion == tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in prompt + completion
        assert tokenizer.decode(prompt + completion) == text
        assert len(prompt) + len(completion) < DEFAULTS["max_length"]
        assert len(completion) < DEFAULTS["max_new_tokens"]


@pytest.mark.parametrize("text", ["seven 1024 é\n\tx=[y]", "  two  spaces ", "日本"])
def test_tokenizer_round_trips_foreign_text(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text


def test_digits_stand_alone(tokenizer):
    assert tokenizer.tokenize(" 2048")[-4:] == ["2", "0", "4", "8"]


def test_base_knows_the_text_of_its_world(tokenizer, model):
    perplexity = math.exp(held_out_loss(model, tokenizer, count=100))
    assert perplexity < 2.4  # it was 2.28 after pretraining; an untrained model has 1024


def test_stories_are_deterministic_and_differ_by_seed():
    first = list(itertools.islice(stories(TRAIN_SEED), 20))
    assert first == list(itertools.islice(stories(TRAIN_SEED), 20))
    assert not set(first) & set(itertools.islice(stories(HELD_OUT_SEED), 20))


def test_stories_never_use_the_tasks_wording(records):
    wording = ("How many were", "Sort these words", "Reverse this list", "Replace ", " asks ", "Which two come next")
    assert all(any(phrase in record["prompt"] for phrase in wording) for record in records)
    text = " ".join(itertools.islice(stories(TRAIN_SEED), 5000))
    assert not [phrase for phrase in wording if phrase in text]


def test_base_has_not_learned_the_tasks(tokenizer, model):
    records = [json.loads(line) for line in TEST_FILE.open(encoding="utf-8")][: 15 * len(TASKS)]
    tokenizer.padding_side = "left"
    batch = tokenizer([record["prompt"] for record in records], return_tensors="pt", padding=True)
    output = model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=DEFAULTS["max_new_tokens"]
    )
    answers = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    hits = [answer.strip() == r["completion"].strip() for answer, r in zip(answers, records, strict=True)]
    for task in TASKS:
        share = sum(hit for hit, r in zip(hits, records, strict=True) if r["task"] == task) / 15
        assert share <= 0.2, task
