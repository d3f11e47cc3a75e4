"""Adapter folders that nobody meant well: every absurd value is one line, in little time and memory."""

import io
import json
import random

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from comol_ds.adapters.adapter_folder import read_adapter, read_config, write_adapter
from comol_ds.errors import UserError
from comol_ds.export.authors import import_authors_adapter
from comol_ds.export.validate import check_folder
from tests.adapters.models import comol_config, tiny_llama
from tests.adapters.test_authors_import import authors_tensors, write_authors_folder

HUGE_TEXT = "x" * 100_000
NO_NUMBERS = [None, True, "4", HUGE_TEXT, [], [1], {}, {"a": 1}]
NO_SIZES = [*NO_NUMBERS, 0, -3, 1.5, 10**9, 10**400, float("nan"), float("inf")]
NO_NAMES = [0, 1.5, True, {}, {"a": 1}, [1], [["a"]], [None]]
REFUSED = {
    "r": NO_SIZES,
    "num_experts": NO_SIZES,
    "lora_alpha": [*NO_NUMBERS, 0, -3, 1e308, 10**400, float("nan"), float("inf")],
    "lora_dropout": [*NO_NUMBERS, -3, 1.5, 10**400, float("nan"), float("inf")],
    "router": [None, 3, [], {}, HUGE_TEXT],
    "core_init": [None, 3, [], {}, HUGE_TEXT],
    "dropout_scheme": [None, 3, [], {}, HUGE_TEXT],
    "target_modules": [*NO_NAMES, "((", "(" * 100_000],
    "exclude_modules": [*NO_NAMES, "((", "(" * 100_000],
    "modules_to_save": [*NO_NAMES, "lm_head", ["("]],
    "layers_to_transform": [1.5, True, "4", HUGE_TEXT, ["1"], [-1], {}, [[1]], float("nan")],
    "layers_pattern": [*NO_NAMES, "((", HUGE_TEXT],
    "init_adapter_weights": [None, 0, "yes", []],
    "inference_mode": [None, 0, "yes", []],
    "base_model_name_or_path": [0, True, [], {"a": 1}],
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The files of an adapter folder, by name."""
    model = get_peft_model(tiny_llama(), comol_config())
    folder = tmp_path_factory.mktemp("adapter")
    write_adapter(get_peft_model_state_dict(model), model.peft_config["default"], folder)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def folder(written, tmp_path):
    for name, content in written.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def change_config(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refusal(action, *arguments) -> str:
    with pytest.raises(UserError) as raised:
        action(*arguments)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 700
    return str(raised.value)


@pytest.mark.parametrize("name", REFUSED)
def test_an_absurd_value_is_refused_by_its_name(name, folder):
    for value in REFUSED[name]:
        change_config(folder, **{name: value})
        assert refusal(read_config, folder).startswith(f"{folder}/adapter_config.json: {name} "), value
    assert check_folder(folder, "peft")[0].startswith(f"{folder}: adapter_config.json: {name} ")


@pytest.mark.parametrize("name", ["r", "num_experts"])
def test_peft_attaches_nothing_of_an_absurd_size(name, folder):
    change_config(folder, **{name: 10**9})
    model = tiny_llama()
    before = sum(parameter.numel() for parameter in model.parameters())
    expected = f"{name} is 1000000000; it must be a whole number of at least 1 and at most 65536"
    assert refusal(PeftModel.from_pretrained, model, folder) == expected
    assert sum(parameter.numel() for parameter in model.parameters()) == before


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_tensors_of_other_kinds_are_refused(dtype, folder):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith(".comol_B"))
    save_file(tensors | {key: torch.zeros_like(tensors[key]).to(dtype)}, file)
    expected = f"{file}: {key} is stored as {dtype}; use float32, bfloat16, float16 or float64"
    assert refusal(read_adapter, folder) == expected


def test_damaged_tensor_files_are_refused_and_never_crash(folder):
    file, chance, outcomes = folder / "adapter_model.safetensors", random.Random(0), []
    whole = file.read_bytes()
    for _ in range(100):
        content = bytearray(whole)
        for _ in range(chance.choice([1, 3, 10])):
            content[chance.randrange(chance.choice([8, 300, 2500]))] = chance.randrange(256)
        file.write_bytes(content[: chance.choice([len(content), chance.randrange(len(content))])])
        try:
            outcomes.append(read_adapter(folder)[0])
        except UserError as error:
            assert "\n" not in str(error) and str(error).startswith(str(file))
            outcomes.append(None)
    assert outcomes.count(None) > 90


def pickled(tensors, zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_pickles_of_the_authors_are_refused_and_never_crash(zipped, tmp_path):
    source, chance, refused = write_authors_folder(tmp_path / "authors"), random.Random(0), 0
    whole = pickled(authors_tensors(True), zipped)
    for number in range(60):
        content = bytearray(whole)
        for _ in range(chance.choice([1, 3, 10])):
            content[chance.randrange(min(len(content), chance.choice([200, 4000])))] = chance.randrange(256)
        (source / "adapter_model.bin").write_bytes(content)
        try:
            import_authors_adapter(source, tmp_path / f"ours{number}")
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 700
            refused += 1
    assert refused > 20


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_experts": 60_000}, "60000; missing: lora_Cores.3, lora_Cores.4, lora_Cores.5, lora_Cores.6"),
        ({"num_experts": 10**9}, "num_experts in {config} is 1000000000; it must be a whole number of at least 1"),
        ({"lora_alpha": float("nan")}, "{source}: lora_alpha is nan; it must be a number above 0"),
        ({"lora_dropout": "0.1"}, "{source}: lora_dropout is '0.1'; it must lie in"),
        ({"core_router": "no"}, "core_router in {config} is 'no'; it must be true or false"),
        ({"tensors": {"x": torch.ones(1).expand(1 << 20, 1 << 20)}}, "'x' is no plain tensor with a number of its own"),
        ({"tensors": {"x": torch.ones(2, 2).to_sparse()}}, "'x' is no plain tensor with a number of its own"),
        ({"tensors": {"x": torch.ones(2, device="meta")}}, "'x' is no plain tensor with a number of its own"),
        ({"tensors": {1: torch.ones(2)}}, "holds no tensors"),
    ],
)  # fmt: skip
def test_absurd_folders_of_the_authors_are_refused(changed, message, tmp_path):
    source = write_authors_folder(tmp_path / "authors", **changed)
    found = refusal(import_authors_adapter, source, tmp_path / "ours")
    assert message.format(source=source, config=source / "adapter_config.json") in found
    assert not (tmp_path / "ours").exists()
