"""Tokenizers with more ids than the embedding has rows, and rows longer than a table of positions."""

from types import SimpleNamespace

import datasets
import pytest
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    XGLMConfig,
)

from comol_ds.config import DataSettings, ModelSettings, RunConfig, RunSettings
from comol_ds.errors import UserError
from comol_ds.training.base_checks import (
    Positions,
    check_answers,
    check_positions,
    check_token_ids,
    check_tokenizer,
)
from tests.data.data_helpers import tiny_tokenizer

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
TABLES = [
    GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64, n_positions=32),
    OPTConfig(**SMALL, ffn_dim=16, word_embed_proj_dim=16, max_position_embeddings=32),
    GPTJConfig(n_embd=16, n_layer=1, n_head=2, vocab_size=64, n_positions=32, rotary_dim=4),
    GPTNeoConfig(
        hidden_size=16, num_layers=1, num_heads=2, attention_types=[[["global"], 1]], max_position_embeddings=32
    ),
]
COMPUTED = [
    LlamaConfig(**SMALL, intermediate_size=16, max_position_embeddings=32),
    XGLMConfig(d_model=16, num_layers=1, attention_heads=2, ffn_dim=16, vocab_size=64, max_position_embeddings=32),
]
WITHOUT_A_NUMBER = [
    BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=64),
    MambaConfig(hidden_size=16, num_hidden_layers=1, state_size=4, vocab_size=64),
]


def run_of(max_length: int, answers: int = 0) -> RunConfig:
    return RunConfig(
        model=ModelSettings(attn_implementation="eager"),
        data=DataSettings(max_length=max_length),
        run=RunSettings(max_generate_records=answers, max_new_tokens=8),
    )


def kind(config) -> str:
    return config.model_type


@pytest.mark.parametrize("config", TABLES, ids=kind)
def test_rows_longer_than_a_table_of_positions(config):
    assert check_positions(config, run_of(32)) == Positions()
    with pytest.raises(UserError) as error:
        check_positions(config, run_of(33))
    assert str(error.value) == (
        "--max_length 33 is more than the 32 positions that the model has (max_position_embeddings); use"
        " --max_length 32 or less"
    )
    assert check_positions(config, run_of(24, answers=4)) == Positions()
    assert check_positions(config, run_of(25, answers=4)) == Positions(table=32)
    assert config.max_position_embeddings == 32  # the model's own is not changed


@pytest.mark.parametrize("config", COMPUTED, ids=kind)
def test_rows_longer_than_computed_positions_are_told(config):
    assert check_positions(config, run_of(32)) == Positions()
    note = "note: --max_length 33 is more than the 32 positions that the model was made for"
    assert check_positions(config, run_of(33)) == Positions(note=note)
    assert check_positions(config, run_of(25, answers=4)) == Positions()


@pytest.mark.parametrize("config", WITHOUT_A_NUMBER, ids=kind)
def test_models_without_a_number_of_positions(config):
    assert check_positions(config, run_of(10**6)) == Positions()


def test_answers_that_would_grow_beyond_the_table():
    records = {"record_id": ["x:1", "x:2", "x:3"], "task": ["x"] * 3, "reference": ["a", "b", ""]}
    lengths = {"prompt_length": [24, 25, 30], "length": [26, 27, 31]}  # the last one has no answer and is not asked
    data = SimpleNamespace(validation=datasets.Dataset.from_dict(records | lengths))
    check_answers(data, run_of(32, answers=4), table=33)
    check_answers(data, run_of(32, answers=4), table=None)
    check_answers(data, run_of(32, answers=1), table=32)  # the first record alone
    with pytest.raises(UserError) as error:
        check_answers(data, run_of(32, answers=4), table=32)
    assert str(error.value) == (
        "--max_new_tokens 8: the prompt of record x:2 has 25 tokens, and the model 32 positions; use"
        " --max_new_tokens 7, a shorter --max_length, or --max_generate_records 0"
    )


def model_with(rows: int):
    return AutoModelForCausalLM.from_config(LlamaConfig(**SMALL | {"vocab_size": rows}, intermediate_size=16))


def asked(**model_settings) -> RunConfig:
    return RunConfig(model=ModelSettings(model_name_or_path="base", **model_settings))


def test_a_tokenizer_that_fits():
    tokenizer = tiny_tokenizer()
    assert check_tokenizer(model_with(len(tokenizer)), tokenizer, asked()) is None


def test_a_vocabulary_larger_than_the_embedding():
    tokenizer = tiny_tokenizer()
    rows = len(tokenizer) - 1
    with pytest.raises(UserError) as error:
        check_tokenizer(model_with(rows), tokenizer, asked(tokenizer_name="other"))
    assert str(error.value) == (
        f"--tokenizer_name other has {rows + 1} ids, the model's embedding {rows} rows; use the model's own tokenizer"
    )
    with pytest.raises(UserError, match=f"^the tokenizer of base: it has {rows + 1} ids, the model's embedding {rows}"):
        check_tokenizer(model_with(rows), tokenizer, asked())


def test_a_padding_token_beyond_the_embedding():
    tokenizer = tiny_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(UserError, match=f"^the tokenizer of base: pad_token has id {rows}, the model's embedding"):
        check_tokenizer(model_with(rows), tokenizer, asked())


def test_added_tokens_beyond_the_embedding_are_refused_where_the_data_hold_them(monkeypatch):
    tokenizer = tiny_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_tokens(["<image>"])
    assert check_tokenizer(model_with(rows), tokenizer, asked()) == rows

    def data(last: int) -> SimpleNamespace:
        records = {"record_id": ["x:1", "x:2"], "input_ids": [[1, 2], [3, last]]}
        return SimpleNamespace(
            train=datasets.Dataset.from_dict(records), validation=datasets.Dataset.from_dict(records)
        )

    monkeypatch.setattr(datasets.Dataset, "__iter__", None)  # record by record, a million take a minute
    check_token_ids(data(rows - 1), tokenizer, rows)
    check_token_ids(data(rows), tokenizer, None)  # nothing to look at
    with pytest.raises(UserError) as error:
        check_token_ids(data(rows), tokenizer, rows)
    assert str(error.value) == (
        f"record x:2 holds '<image>', a token of id {rows}, and the model's embedding has {rows} rows; remove it from"
        " the data"
    )
