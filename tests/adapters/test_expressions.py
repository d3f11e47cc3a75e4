"""Expressions that never end: one line in seconds, wherever a configuration enters."""

import json
import time
from types import SimpleNamespace

import pytest
from peft import get_peft_model

from comol_ds import CoMoLConfig
from comol_ds.adapters import expressions
from comol_ds.adapters.adapter_folder import CONFIG_FILE, read_adapter
from comol_ds.adapters.expressions import check_matching_ends
from comol_ds.errors import UserError
from comol_ds.export.validate import check_folder
from tests.adapters.models import tiny_llama
from tests.export.adapter_folders import portable_config, portable_tensors, save_base, write

ENDLESS = r"(\w+\.?)+!"  # doubles with every letter of a name


@pytest.fixture(autouse=True)
def short_limit(monkeypatch):
    monkeypatch.setattr(expressions, "_SECONDS", 1)


NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate_proj_of_a_long_name"]


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ENDLESS},
        {"target_modules": ["q_proj"], "exclude_modules": ENDLESS},
        {"target_modules": ["q_proj"], "modules_to_save": [ENDLESS]},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": [ENDLESS]},
        {"target_modules": r".*q_proj", "rank_pattern": {"(no expression": 2, r".*\.v_proj": 3, ENDLESS: 4}},
    ],
    ids=lambda fields: list(fields)[-1],
)
def test_an_endless_expression(fields):
    config = CoMoLConfig(r=2, num_experts=2, **fields) if "rank_pattern" not in fields else SimpleNamespace(**fields)
    started = time.monotonic()
    with pytest.raises(UserError) as error:
        check_matching_ends(config, NAMES)
    assert time.monotonic() - started < 10
    assert str(error.value) == (
        f"{list(fields)[-1]} {ENDLESS!r} takes more than 1 s to match against the model's module names; write a simpler"
        " expression, without repetitions inside repetitions"
    )


def test_it_is_refused_where_the_adapter_is_attached():
    with pytest.raises(UserError, match="takes more than 1 s to match"):
        get_peft_model(tiny_llama(), CoMoLConfig(r=2, num_experts=2, target_modules=ENDLESS))


def test_it_is_refused_where_a_folder_is_read(tmp_path):
    model = get_peft_model(tiny_llama(), CoMoLConfig(r=2, num_experts=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    path = tmp_path / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ENDLESS}))
    with pytest.raises(UserError, match="takes more than 1 s to match"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("changes", [{"target_modules": ENDLESS}, {"rank_pattern": {ENDLESS: 4}}], ids=str)
def test_a_server_is_told_of_it(changes, tmp_path):
    base = save_base(tmp_path / "base")
    folder = write(tmp_path / "adapter", portable_config(base) | changes, portable_tensors())
    assert any("takes more than 1 s to match" in line for line in check_folder(folder, "vllm"))


def test_expressions_as_users_write_them_pass(monkeypatch):
    started = []
    monkeypatch.setattr(expressions.subprocess, "run", lambda *words, **options: started.append(options["input"]))
    config = CoMoLConfig(target_modules=["q_proj", "self_attn.v_proj"], modules_to_save=["lm_head"])
    check_matching_ends(config, NAMES)
    check_matching_ends(CoMoLConfig(target_modules="all-linear"), NAMES)
    assert not started  # nothing repeats in a name
    check_matching_ends(CoMoLConfig(target_modules=r".*\.layers\.\d+\.(q|v)_proj"), NAMES)
    assert len(started) == 1
    check_matching_ends(SimpleNamespace(rank_pattern={rf"layers\.{layer}\..*": layer for layer in range(50)}), NAMES)
    assert len(started) == 2  # one process for all
