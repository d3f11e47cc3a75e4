"""A base model that cannot be trained as asked, or that wants to run its own code: one line, in seconds, no prompt."""

import ast
import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, Gemma2Config, GptOssConfig

import comol_ds
from comol_ds.config import ModelSettings
from comol_ds.terminal import never_ask
from comol_ds.training.plan import preview_model
from tests.data.data_helpers import tiny_tokenizer
from tests.launch.launcher_calls import REPOSITORY, refused

SMALL = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8,
    "num_key_value_heads": 1, "vocab_size": 512,
}  # fmt: skip


@pytest.fixture
def message(inputs, capfd, monkeypatch):
    """Calls the launcher with changed flags and returns why it refused them; nobody is asked anything."""

    def asks(*_):
        raise AssertionError("the user is asked")

    monkeypatch.setattr("builtins.input", asks)
    return lambda *extra, **changes: refused(inputs, capfd, monkeypatch, inputs.argv(*extra, **changes))


@pytest.fixture
def model(inputs):
    """A copy of the tiny model whose files may be changed."""
    return Path(shutil.copytree(inputs.model, inputs.folder / "model"))


def change(model, file="config.json", **values):
    path = model / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(model):
    (model / "own.py").write_text(OWN_CODE)
    change(model, model_type="own", auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"})
    return model


def test_own_code_runs_only_if_asked_for(message, own_code):
    assert message(model_name_or_path=own_code) == (
        f"--model_name_or_path {own_code} brings its own code, which is not run unasked; read it, and give"
        " --trust_remote_code to run it"
    )
    built = preview_model(ModelSettings(model_name_or_path=str(own_code), trust_remote_code=True))
    assert type(built).__name__ == "OwnModel" and built.device.type == "meta"


def test_own_code_of_a_tokenizer(message, model):
    change(
        model, "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map={"AutoTokenizer": ["own.Own", None]}
    )
    assert message(model_name_or_path=model) == (
        f"the tokenizer of {model} brings its own code, which is not run unasked; read it, and give"
        " --trust_remote_code to run it"
    )


def test_no_call_leaves_it_to_transformers_to_ask():
    """transformers prompts, for 15 s, where trust_remote_code is not given."""
    loads = []
    for file in Path(comol_ds.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                loader = ast.unparse(node.func)
                if loader.startswith("Auto") and loader.endswith((".from_pretrained", ".from_config")):
                    loads.append((file.name, loader, [keyword.arg for keyword in node.keywords]))
    assert len(loads) >= 5
    explicit = {"trust_remote_code", None}  # None: a dictionary of options
    assert not [load for load in loads if not explicit & set(load[2])]


def test_who_asks_all_the_same_gets_no_answer(monkeypatch):
    monkeypatch.setattr(sys, "stdin", sys.stdin)
    never_ask()
    assert not sys.stdin.isatty()
    with pytest.raises(EOFError):
        input("Do you wish to run the custom code? [y/N] ")
    for name in ("train", "export", "plan"):
        assert "    never_ask()\n" in (REPOSITORY / "launch" / f"{name}.py").read_text()


@pytest.mark.parametrize("config", [Gemma2Config, GptOssConfig], ids=lambda config: config.model_type)
def test_attention_that_the_model_does_not_have(message, inputs, config):
    path = inputs.folder / "model"
    AutoModelForCausalLM.from_config(config(**SMALL, num_local_experts=2)).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    found = message(model_name_or_path=path)
    assert found.startswith("--attn_implementation sdpa cannot be used with this model here, give"), found
    assert " --attn_implementation eager: " in found
    preview_model(ModelSettings(model_name_or_path=str(path), attn_implementation="eager"))


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash_attn is installed")
def test_attention_whose_package_is_missing(message):
    found = message("--attn_implementation", "flash_attention_2", bf16="true")
    assert found.startswith("--attn_implementation flash_attention_2 cannot be used with this model here, give"), found
    assert " --attn_implementation sdpa: " in found


BROKEN = [
    ("config.json", '{"a": ' * 5000, "--model_name_or_path {} cannot be read; check its config.json: "),
    ("config.json", '{"model_type": "llama", "hidden_size": "wide"}', "--model_name_or_path {} cannot be read; check"),
    ("generation_config.json", "{", "--model_name_or_path {} cannot be read; repair or remove its generation_config"),
    ("generation_config.json", "[" * 5000, "--model_name_or_path {} cannot be read; repair or remove its generation_"),
    ("tokenizer.json", "{}", "the tokenizer of {} cannot be read; copy its files (tokenizer.json or tokenizer.model"),
    ("tokenizer_config.json", "[" * 5000, "the tokenizer of {} cannot be read; copy its files"),
]


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: f"{case[0]} {case[1][:10]}")
def test_broken_file(case, message, model):
    file, content, expected = case
    (model / file).write_text(content)
    assert message(model_name_or_path=model).startswith(expected.format(model))


def test_counts_that_no_model_has(message, model):
    change(model, num_hidden_layers=10**9)
    assert message(model_name_or_path=model) == (
        f"--model_name_or_path {model}: num_hidden_layers in its config.json is 1000000000, more than any model has;"
        " repair it"
    )


def test_quantized_base(message, model):
    change(model, quantization_config={"quant_method": "gptq"})
    assert "is quantized (quantization_config in its config.json); use the model's" in message(model_name_or_path=model)
