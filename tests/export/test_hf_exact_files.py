"""What an hf-exact export does with the files that it finds, and what it refuses."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from comol_ds.adapters.adapter_folder import read_adapter
from comol_ds.errors import UserError
from comol_ds.export.hf_exact import ADAPTER_FILE, write_hf_exact
from tests.export.hf_exact_cases import Case, export, train
from tests.export.merging.merge_bases import shards_in_folders


@pytest.fixture
def trained(tmp_path):
    train(tmp_path)
    return tmp_path


def refuse_link(*_):
    raise OSError(errno.EXDEV, "Invalid cross-device link")


def test_a_base_on_another_file_system_is_copied(trained, monkeypatch):
    monkeypatch.setattr(os, "link", refuse_link)
    report = export(trained)
    size = (trained / "base" / "model.safetensors").stat().st_size
    assert (report.linked_bytes, report.copied_bytes) == (0, size)
    copy, original = trained / "served" / "base_model.safetensors", trained / "base" / "model.safetensors"
    assert copy.read_bytes() == original.read_bytes() and copy.stat().st_ino != original.stat().st_ino
    assert report.lines()[1] == "weights of the base: 0.00 GB copied"


ONE_NAME = {
    "in two folders": ("w.safetensors", "sub/w.safetensors"),
    "of the adapter's file": (ADAPTER_FILE, "sub/w.safetensors"),
    "of the tokenizer's files": ("tokenizer.safetensors", "sub/vocab.safetensors"),
}


@pytest.mark.parametrize("can_link", [True, False])
@pytest.mark.parametrize("names", ONE_NAME.values(), ids=ONE_NAME)
def test_no_file_of_the_base_is_written_whatever_it_is_called(names, can_link, trained, tmp_path, monkeypatch):
    shards_in_folders(trained / "base", *names)
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name in names:
        (tokenizer / Path(name).name).write_text("of the tokenizer's folder")
    before = {path: path.read_bytes() for path in (trained / "base").rglob("*") if path.is_file()}
    if not can_link:
        monkeypatch.setattr(os, "link", refuse_link)
    export(trained, tokenizer_folder=tokenizer)
    assert {path: path.read_bytes() for path in before} == before
    model, served = (
        AutoModelForCausalLM.from_pretrained(trained / name, trust_remote_code=True) for name in ("base", "served")
    )
    served_weights = {key.replace("base_layer.", ""): value for key, value in served.state_dict().items()}
    assert all(torch.equal(served_weights[key], value) for key, value in model.state_dict().items())


def test_links_of_the_hub_cache_are_followed(trained):
    """Its snapshots hold symbolic links into another folder."""
    stored = trained / "blob"
    (trained / "base" / "model.safetensors").rename(stored)
    (trained / "base" / "model.safetensors").symlink_to(stored)
    export(trained)
    assert (trained / "served" / "base_model.safetensors").stat().st_ino == stored.stat().st_ino
    assert not (trained / "served" / "base_model.safetensors").is_symlink()


def test_the_tokenizer_can_lie_elsewhere(trained, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("another")
    (trained / "base" / "LICENSE.txt").write_text("terms")
    export(trained, tokenizer_folder=tmp_path / "tokenizer")
    assert (trained / "served" / "tokenizer.json").read_text() == "another"
    assert not (trained / "served" / "chat_template.jinja").exists()
    assert (trained / "served" / "LICENSE.txt").read_text() == "terms"


def test_an_existing_checkpoint_is_replaced_only_if_asked(trained):
    (trained / "base" / "LICENSE").touch()
    export(trained)
    (trained / "base" / "LICENSE").unlink()
    with pytest.raises(UserError, match="exists; choose another --output_dir or add --overwrite_output_dir"):
        export(trained)
    export(trained, overwrite=True)
    assert not (trained / "served" / "LICENSE").exists()
    assert not [path for path in trained.iterdir() if path.name.startswith(".")]


def test_the_base_itself_is_never_replaced(trained):
    for target in (trained / "base", trained):
        with pytest.raises(UserError, match=r"holds .*base, which is read; choose another --output_dir"):
            write_hf_exact(trained / "base", *read_adapter(trained / "adapter"), target, overwrite=True)
    assert (trained / "base" / "model.safetensors").exists()


def change_config(folder: Path, **values) -> None:
    path = folder / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(folder: Path, change) -> None:
    path = folder / "base" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def as_int8(tensors):
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)


def narrow(tensors):
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name][:, :-1].contiguous()


BAD_BASES = {
    "no folder": (
        lambda folder: shutil.rmtree(folder / "base"),
        "{base} is not a model folder: config.json is missing",
    ),
    "no weights": (
        lambda folder: (folder / "base" / "model.safetensors").unlink(),
        "{base} has neither model.safetensors nor model.safetensors.index.json; load the model and write it with"
        " transformers' save_pretrained",
    ),
    "unknown architecture": (
        lambda folder: change_config(folder, model_type="mamba"),
        "{base}/config.json: model type 'mamba' is not supported by hf-exact, which knows llama, qwen2, qwen3, mistral,"
        " gemma3_text; use --format comol",
    ),
    "code of its own": (
        lambda folder: change_config(folder, auto_map={"AutoModel": "modeling.Model"}),
        "{base}/config.json: model type 'llama' with its own code (auto_map) is not supported by hf-exact, which knows"
        " llama, qwen2, qwen3, mistral, gemma3_text; use --format comol",
    ),
    "quantized": (
        lambda folder: change_config(folder, quantization_config={"quant_method": "gptq"}),
        "{base} has a quantization_config, a quantized model; give its float32, bfloat16 or float16 weights with"
        " --model_name_or_path",
    ),
    "quantized, unsaid": (
        lambda folder: change_weights(folder, as_int8),
        "{base} stores tensor 'lm_head.weight' as I8, a quantized model; give its float32, bfloat16 or float16 weights"
        " with --model_name_or_path",
    ),
    "a tensor short": (
        lambda folder: change_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight")),
        "{base} and the adapter: no tensor for 'model.layers.1.mlp.up_proj.weight' of the model",
    ),
    "a tensor too many": (
        lambda folder: change_weights(folder, lambda tensors: tensors.update(extra=torch.ones(2))),
        "{base} and the adapter: tensor 'extra' has no place in a model of their configurations",
    ),
    "a tensor of another shape": (
        lambda folder: change_weights(folder, narrow),
        "{base} and the adapter: tensor 'model.layers.0.self_attn.q_proj.weight' has shape [32, 31], their"
        " configurations make it [32, 32]",
    ),
    "fewer layers than the adapter": (
        lambda folder: change_config(folder, num_hidden_layers=1),
        "{base} and the adapter: tensor 'model.layers.1.input_layernorm.weight' has no place in a model of their"
        " configurations",
    ),
}


@pytest.mark.parametrize("fault", BAD_BASES)
def test_a_bad_base_is_refused_and_nothing_is_left(trained, fault):
    damage, message = BAD_BASES[fault]
    damage(trained)
    with pytest.raises(UserError) as caught:
        export(trained)
    assert str(caught.value) == message.format(base=trained / "base")
    assert not (trained / "served").exists() and not [path for path in trained.iterdir() if path.name.startswith(".")]


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_an_adapter_outside_the_layers_is_refused(tmp_path):
    train(tmp_path, Case(adapter={"target_modules": ["q_proj", "lm_head"]}))
    with pytest.raises(UserError) as caught:
        export(tmp_path)
    assert str(caught.value) == (
        "lm_head has an adapter and lies outside model.layers, which hf-exact does not support; use --format comol"
    )


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_tied_end_that_was_trained_whole_is_refused(tmp_path):
    train(tmp_path, Case("llama_tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}))
    with pytest.raises(UserError) as caught:
        export(tmp_path)
    assert str(caught.value) == (
        f"the adapter holds lm_head trained whole (modules_to_save), which {tmp_path / 'base'} ties to the other end of"
        " the model; hf-exact does not support that, use --format comol"
    )


def test_the_configuration_is_the_base_s_with_the_adapter(trained):
    export(trained)
    base = json.loads((trained / "base" / "config.json").read_text())
    served = json.loads((trained / "served" / "config.json").read_text())
    assert {name: served[name] for name in base if name not in ("model_type", "architectures")} == {
        name: value for name, value in base.items() if name not in ("model_type", "architectures")
    }
    assert served["comol_scaling"] == 2.0 and served["comol_modules"]["self_attn.o_proj"] == [0, 1]
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoConfig.from_pretrained(trained / "served", trust_remote_code=False)
    with safe_open(trained / "served" / ADAPTER_FILE, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
