"""The adapter folder: what is written, what is refused, what a fault leaves behind."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from comol_ds.adapters import adapter_folder
from comol_ds.adapters.adapter_folder import read_adapter, read_config, verify_tensors, write_adapter
from comol_ds.errors import UserError
from tests.adapters.models import comol_config, tiny_llama, tokens

KEY = "base_model.model.model.layers.0.self_attn.q_proj.comol_"


@pytest.fixture
def adapter():
    """(model, tensors, config) of a fresh adapter with a non-zero B."""
    model = get_peft_model(tiny_llama(), comol_config()).eval()
    return model, get_peft_model_state_dict(model), model.peft_config["default"]


def test_peft_reads_what_is_written(adapter, tmp_path):
    model, tensors, config = adapter
    write_adapter(tensors, config, tmp_path / "deep" / "adapter")
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["adapter"]
    assert sorted(p.name for p in (tmp_path / "deep" / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    written = json.loads((tmp_path / "deep" / "adapter" / "adapter_config.json").read_text())
    assert written["peft_type"] == "COMOL" and written["inference_mode"] is True
    # a set's order changes from process to process, the folder's bytes must not
    assert written["target_modules"] == ["down_proj", "k_proj", "o_proj", "q_proj", "v_proj"]
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "deep" / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tokens()).logits, model(input_ids=tokens()).logits)
    assert config.inference_mode is False


def test_what_peft_writes_is_read(adapter, tmp_path):
    model, tensors, config = adapter
    model.save_pretrained(tmp_path)
    read, values = read_adapter(tmp_path)
    assert read.target_modules == config.target_modules and read.num_experts == 3
    assert values.keys() == tensors.keys()
    assert all(torch.equal(values[key], tensors[key]) for key in values)
    read_adapter(tmp_path)


def test_writing_is_deterministic_and_replaces_in_place(adapter, tmp_path):
    _, tensors, config = adapter
    write_adapter(tensors, config, tmp_path / "a")
    write_adapter(tensors, config, tmp_path / "b")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    (tmp_path / "a" / "notes.txt").write_text("mine")
    write_adapter({key: value + 1 for key, value in tensors.items()}, config, tmp_path / "a")
    assert torch.equal(read_adapter(tmp_path / "a")[1][KEY + "A"], tensors[KEY + "A"] + 1)
    assert (tmp_path / "a" / "notes.txt").read_text() == "mine"


def test_modules_to_save_travel_along(tmp_path):
    model = get_peft_model(tiny_llama(), comol_config(modules_to_save=["lm_head"]))
    tensors = get_peft_model_state_dict(model)
    write_adapter(tensors, model.peft_config["default"], tmp_path / "a")
    assert "base_model.model.lm_head.weight" in read_adapter(tmp_path / "a")[1]
    bad = {**tensors, "base_model.model.lm_head.weight": torch.empty(0)}
    with pytest.raises(UserError, match=r"lm_head.weight is empty"):
        write_adapter(bad, model.peft_config["default"], tmp_path / "b")


def replaced(name, value):
    return lambda tensors: {**tensors, KEY + name: value(tensors[KEY + name])}


FAULTS = {
    "nothing": (lambda tensors: {}, "the adapter has no tensors"),
    "not gathered": (replaced("A", lambda t: t.new_empty(0)), r"q_proj.comol_A is empty, shape \[0\]"),
    "nan": (replaced("B", lambda t: t * float("nan")), "q_proj.comol_B holds values that are not finite"),
    "inf": (replaced("cores", lambda t: t / 0), "q_proj.comol_cores holds values that are not finite"),
    "transposed": (replaced("A", lambda t: t.T), r"q_proj: comol_B has R=4, but .* 32"),
    "a slice of A": (replaced("A", lambda t: t[:2]), r"q_proj: comol_B has R=4, but .* 2"),
    "flat cores": (replaced("cores", lambda t: t.flatten(1)), r"comol_cores has shape \[3, 16\], expected axes"),
    "one router row less": (replaced("router", lambda t: t[:2]), r"comol_router has E=2, but .* 3"),
    "a name missing": (
        lambda tensors: {key: value for key, value in tensors.items() if key != KEY + "router"},
        "q_proj: tensor comol_router is missing",
    ),
    "the adapter's name": (
        lambda tensors: {key + ".default": value for key, value in tensors.items()},
        "comol_A.default: unknown adapter tensor",
    ),
    "an unknown tensor": (lambda tensors: {**tensors, KEY + "gate": torch.ones(1)}, "comol_gate: unknown adapter"),
    "a foreign prefix": (
        lambda tensors: {key.removeprefix("base_model."): value for key, value in tensors.items()},
        "a key starts with base_model.model.",
    ),
    "a module that is no target": (
        lambda tensors: {
            **tensors,
            **{key.replace("q_proj", "up_proj"): value for key, value in tensors.items() if key.startswith(KEY)},
        },
        "up_proj has adapter tensors, but target_modules do not reach it",
    ),
    "only a saved module": (lambda tensors: {"base_model.model.lm_head.weight": torch.ones(2, 2)}, "no comol_ tensors"),
}


@pytest.mark.parametrize(("damage", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_faulty_tensors_are_neither_written_nor_read(adapter, tmp_path, damage, message):
    _, tensors, config = adapter
    bad = damage(tensors)
    with pytest.raises(UserError, match=message) as error:
        write_adapter(bad, config, tmp_path / "a")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
    write_adapter(tensors, config, tmp_path / "a")
    save_file(
        {key: value.clone().contiguous() for key, value in bad.items()}, tmp_path / "a" / "adapter_model.safetensors"
    )
    with pytest.raises(UserError, match=message) as error:
        read_adapter(tmp_path / "a")
    assert "adapter_model.safetensors" in str(error.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"r": 8}, "has rank 4 and 3 experts, the configuration says r=8 and num_experts=3"),
        ({"num_experts": 2}, "has rank 4 and 3 experts, the configuration says r=4 and num_experts=2"),
        ({"router": "input"}, r"comol_router has I=4, but .* 32"),
        ({"target_modules": None}, "target_modules is not resolved"),
    ],
)
def test_a_configuration_of_another_adapter(adapter, changed, message):
    _, tensors, _ = adapter
    with pytest.raises(UserError, match=message):
        verify_tensors(tensors, comol_config(**changed))


def test_a_failed_write_leaves_the_old_adapter(adapter, tmp_path, monkeypatch):
    _, tensors, config = adapter
    write_adapter(tensors, config, tmp_path / "a")

    def full_disk(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(adapter_folder, "save_tensors", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_adapter({key: value + 1 for key, value in tensors.items()}, config, tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert torch.equal(read_adapter(tmp_path / "a")[1][KEY + "A"], tensors[KEY + "A"])


def test_leftovers_of_a_killed_run_do_not_matter(adapter, tmp_path):
    _, tensors, config = adapter
    (tmp_path / ".a.writing").mkdir()
    (tmp_path / ".a.writing" / "adapter_config.json").write_text("{")
    write_adapter(tensors, config, tmp_path / "a")
    read_adapter(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_disk_that_returns_other_bytes_is_noticed(adapter, tmp_path, monkeypatch):
    _, tensors, config = adapter

    def flipped(path):
        return {key: value + (key == KEY + "A") for key, value in load_file(path).items()}

    monkeypatch.setattr(adapter_folder, "load_file", flipped)
    with pytest.raises(OSError, match="reads back differently"):
        write_adapter(tensors, config, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_unreadable_folders(adapter, tmp_path):
    _, tensors, config = adapter
    with pytest.raises(UserError, match=r"adapter_config.json is missing"):
        read_adapter(tmp_path)
    write_adapter(tensors, config, tmp_path / "a")
    tensor_file, config_file = tmp_path / "a" / "adapter_model.safetensors", tmp_path / "a" / "adapter_config.json"
    whole = tensor_file.read_bytes()
    tensor_file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"adapter_model\.safetensors cannot be read"):
        read_adapter(tmp_path / "a")
    tensor_file.unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is missing"):
        read_adapter(tmp_path / "a")
    good = config_file.read_text()
    for text, message in [
        ("{", "cannot be read"),
        ("[]", "peft_type None, expected 'COMOL'"),
        (json.dumps({**json.loads(good), "peft_type": "LORA"}), "peft_type 'LORA', expected 'COMOL'"),
        (json.dumps({**json.loads(good), "r": 0}), "r is 0; it must be"),
    ]:
        config_file.write_text(text)
        with pytest.raises(UserError, match=message):
            read_config(tmp_path / "a")
