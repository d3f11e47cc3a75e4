"""The LoRA folder: what stands in it, what PEFT computes from it, what is refused."""

import json
import re

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from comol_ds.adapters.adapter_folder import read_adapter
from comol_ds.adapters.comol_layer import CoMoLLinear
from comol_ds.errors import UserError
from comol_ds.export import lora_folder
from comol_ds.export.base_modules import read_base_modules
from comol_ds.export.core_sums import calibrate
from comol_ds.export.lora_folder import write_lora
from comol_ds.export.static_core import least_squares_cores, static_lora
from comol_ds.export.static_lora import StaticLora
from comol_ds.export.validate import SERVERS, check_folder
from comol_ds.output_folder import EXPORT_MARK, files_in, write_mark
from tests.export.static_models import plain_batch
from tests.tiny_models import save_tiny_model
from tests.trained_adapters import save_trained_adapter

SIBLINGS = ["gate_proj", "k_proj", "q_proj", "up_proj", "v_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("lora") / "base")


def some_lora(base, modules=("model.layers.1.self_attn.k_proj", "model.layers.0.mlp.up_proj"), rank=5) -> StaticLora:
    """A random LoRA that does not need a CoMoL adapter."""
    generator, shapes = torch.Generator().manual_seed(1), read_base_modules(base).sizes
    down = {module: torch.randn(rank, shapes[module][0], generator=generator) for module in modules}
    up = {module: torch.randn(shapes[module][1], rank, generator=generator) for module in modules}
    return StaticLora(down, up, rank)


def with_constant_cores(model, tensors, config, cores):
    """The base Linears, and s (h Mbar) B^T literally beside each, in float64."""
    for name, layer in model.named_modules():
        if isinstance(layer, CoMoLLinear):
            module = name.removeprefix("base_model.model.")
            down, up = (tensors[f"{name}.comol_{letter}"].double() for letter in "AB")

            def forward(x, layer=layer, down=down, up=up, core=cores[module]):
                update = config.lora_alpha / config.r * ((x.double() @ down.t()) @ core) @ up.t()
                return (layer.base_layer(x) + update).to(x.dtype)

            layer.forward = forward
    return model


@pytest.mark.parametrize(
    "family, router", [("llama", "core"), ("llama", "input"), ("qwen2", "core"), ("gemma3", "input")]
)
def test_peft_computes_what_the_model_with_constant_cores_does(family, router, tmp_path):
    base = save_tiny_model(tmp_path / "base", family)
    model = save_trained_adapter(tmp_path / "adapter", base, router=router)
    config, tensors = read_adapter(tmp_path / "adapter")
    cores = least_squares_cores(calibrate(model, [plain_batch(6, seed=5)]))
    write_lora(static_lora(tensors, config, cores), base, tmp_path / "lora")
    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora").eval()
    batch = plain_batch(2, seed=9)
    with torch.no_grad():
        routed = model(**batch).logits
        found = lora(**batch).logits
        expected = with_constant_cores(model, tensors, config, cores)(**batch).logits
        without = lora.unload()(**batch).logits
    here = batch["attention_mask"].bool()
    assert (found - expected)[here].abs().max() <= 1e-6
    assert (routed - expected)[here].abs().max() > 1e-3 and (without - expected)[here].abs().max() > 1e-3


def test_the_folder_is_the_portable_form(base, tmp_path):
    lora = some_lora(base)
    write_lora(lora, base, tmp_path / "deep" / "lora")
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["lora"]
    assert sorted(path.name for path in (tmp_path / "deep" / "lora").iterdir()) == [
        EXPORT_MARK,
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert json.loads((tmp_path / "deep" / "lora" / "adapter_config.json").read_text()) == {
        "base_model_name_or_path": str(base),
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 8,
        "target_modules": SIBLINGS,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def test_what_a_server_fuses_and_every_layer_has_a_pair(base, tmp_path):
    lora, shapes = some_lora(base), read_base_modules(base).sizes
    write_lora(lora, base, tmp_path / "lora")
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    modules = [f"model.layers.{layer}.mlp.{name}_proj" for layer in range(2) for name in ("gate", "up")]
    modules += [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(2) for name in "qkv"]
    keys = {f"base_model.model.{module}.lora_{letter}.weight" for module in modules for letter in "AB"}
    assert tensors.keys() == keys
    for module in modules:
        down, up = (tensors[f"base_model.model.{module}.lora_{letter}.weight"] for letter in "AB")
        assert down.dtype == up.dtype == torch.float32
        assert (tuple(down.shape), tuple(up.shape)) == ((8, shapes[module][0]), (shapes[module][1], 8))
        if module in lora.down:
            assert torch.equal(down[:5], lora.down[module]) and torch.equal(up[:, :5], lora.up[module])
            down, up = down[5:], up[:, 5:]
        assert not down.any() and not up.any()


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize(("rank", "written"), [(4, 8), (8, 8), (12, 16), (16, 16), (17, 32)])
def test_no_server_misreads_the_folder(rank, written, server, base, tmp_path):
    write_lora(some_lora(base, rank=rank), base, tmp_path / "lora")
    assert check_folder(tmp_path / "lora", server, base) == []
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == written


def test_an_empty_folder_is_filled(base, tmp_path):
    (tmp_path / "lora").mkdir()
    write_lora(some_lora(base), base, tmp_path / "lora")
    assert len(list((tmp_path / "lora").iterdir())) == 3


def test_modules_without_siblings_stand_alone(base, tmp_path):
    write_lora(some_lora(base, ["model.layers.0.mlp.down_proj"]), base, tmp_path / "lora")
    keys = load_file(tmp_path / "lora" / "adapter_model.safetensors").keys()
    assert {re.sub(r"\.lora_.*", "", key) for key in keys} == {
        f"base_model.model.model.layers.{layer}.mlp.down_proj" for layer in range(2)
    }
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["target_modules"] == ["down_proj"]


def test_the_same_lora_gives_the_same_bytes(base, tmp_path):
    for name in "ab":
        write_lora(some_lora(base), base, tmp_path / name)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_tensors_can_be_written_in_bf16(base, tmp_path):
    lora = some_lora(base)
    write_lora(lora, base, tmp_path / "lora", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    for module, up in lora.up.items():
        assert torch.equal(tensors[f"base_model.model.{module}.lora_B.weight"][:, :5], up.bfloat16())


def test_overwriting_replaces_an_earlier_export_with_its_report(base, tmp_path):
    folder = tmp_path / "lora"
    write_lora(some_lora(base), base, folder)
    (folder / "fidelity.json").write_text("{}")
    write_mark(folder, EXPORT_MARK, files_in(folder))
    lora = some_lora(base, ["model.layers.0.mlp.down_proj"])
    write_lora(lora, base, folder, overwrite=True)
    names = [EXPORT_MARK, "adapter_config.json", "adapter_model.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == names
    tensors = load_file(folder / "adapter_model.safetensors")
    for module, up in lora.up.items():
        assert torch.equal(tensors[f"base_model.model.{module}.lora_B.weight"][:, :5], up)


def test_a_failure_leaves_nothing_behind(base, tmp_path, monkeypatch):
    monkeypatch.setattr(lora_folder, "load_file", lambda path: {})
    with pytest.raises(UserError, match="reads back differently"):
        write_lora(some_lora(base), base, tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []


def existing_folder(base, target):
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    write_lora(some_lora(base), base, target)


def a_file(base, target):
    target.write_text("")
    write_lora(some_lora(base), base, target, overwrite=True)


def no_such_linear(base, target):
    lora = some_lora(base, ["model.layers.0.mlp.up_proj"])
    renamed = {side: {"model.layers.0.mlp.w1": getattr(lora, side).popitem()[1]} for side in ("down", "up")}
    write_lora(StaticLora(**renamed, rank=5), base, target)


def another_size(base, target):
    module = "model.layers.0.mlp.up_proj"
    write_lora(StaticLora({module: torch.ones(5, 64)}, {module: torch.ones(48, 5)}, 5), base, target)


def too_large_for_fp16(base, target):
    lora = some_lora(base, ["model.layers.0.mlp.up_proj"])
    lora.up["model.layers.0.mlp.up_proj"][0, 0] = 1e5
    write_lora(lora, base, target, dtype=torch.float16)


@pytest.mark.parametrize(
    "ask, message",
    [
        (existing_folder, "{target} exists; choose another --output_dir or add --overwrite_output_dir"),
        (a_file, "{target} is a file; --output_dir names a folder"),
        (
            no_such_linear,
            "the base has no Linear at model.layers.0.mlp.w1, the adapter was trained on one 32 -> 48;"
            " give the base it was trained on with --model_name_or_path",
        ),
        (
            another_size,
            "the base has a Linear 32 -> 48 at model.layers.0.mlp.up_proj, the adapter was trained on one 64 -> 48;"
            " give the base it was trained on with --model_name_or_path",
        ),
        (
            too_large_for_fp16,
            "lora_B of model.layers.0.mlp.up_proj holds values that are not finite in torch.float16;"
            " write it in float32",
        ),
    ],
)
def test_what_is_refused_writes_nothing(ask, message, base, tmp_path):
    target = tmp_path / "lora"
    with pytest.raises(UserError) as error:
        ask(base, target)
    assert str(error.value) == message.format(target=target)
    assert [path for path in tmp_path.rglob("*") if path not in (target, target / "notes.txt")] == []


def test_a_base_that_cannot_be_read_is_named(base, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as error:
        write_lora(some_lora(base), tmp_path / "empty", tmp_path / "lora")
    assert str(error.value).startswith(f"base model '{tmp_path}/empty' cannot be read; ")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
