"""The structural validator: what it says about a planted fault, and what it leaves alone."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from comol_ds.adapters.adapter_folder import write_adapter
from comol_ds.adapters.config import CoMoLConfig
from comol_ds.errors import UserError
from comol_ds.export import vllm_lora
from comol_ds.export.lora_folder import write_lora
from comol_ds.export.servers import CONSEQUENCES, SERVERS
from comol_ds.export.static_lora import StaticLora
from comol_ds.export.validate import GATED_KEY, GUARD_PREFIX, LIMITS, check_folder, check_servers, validate_folder
from tests.export.adapter_folders import (
    LAYER_0,
    LAYERS,
    NAMES,
    O1,
    Q0,
    RANK,
    config_edit,
    fuse,
    portable_config,
    portable_tensors,
    put,
    save_base,
    write,
)
from tests.export.planted_faults import ROWS


@pytest.fixture
def base(tmp_path):
    return save_base(tmp_path / "base")


@pytest.fixture
def folder(tmp_path, base):
    return write(tmp_path / "adapter", portable_config(base), portable_tensors())


def placed(line: str, folder: Path) -> str:
    names = {"C": "adapter_config.json", "T": "adapter_model.safetensors", "F": ""}
    for letter, name in names.items():
        line = line.replace(f"{{{letter}}}", str(folder / name).rstrip("/"))
    return line


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.kind)
def test_a_planted_fault_is_named_with_what_the_server_does_and_the_remedy(row, folder):
    row.plant(folder)
    assert check_folder(folder, row.server) == [placed(row.line, folder)]


# A folder of another form is a fault of its own for the servers that take LoRAs only.
FORMS = {"CoMoL form", "CoMoL adapter", "gated form", "gated form called LORA", "gated form unguarded", "gated rank"}


@pytest.mark.parametrize("row", [row for row in ROWS if row.kind not in FORMS], ids=lambda row: row.kind)
def test_a_fault_is_reported_for_the_servers_it_harms_and_no_other(row, folder):
    row.plant(folder)
    reported = {server for server, problems in check_servers(folder).items() if problems}
    adapted_head = {"tgi"} if row.kind in ("tied vocabulary", "vocabulary too large") else set()
    assert reported == set(CONSEQUENCES[row.kind]) | adapted_head


def test_every_kind_of_fault_has_a_row_and_every_row_its_own_line():
    assert sorted(row.kind for row in ROWS) == sorted(CONSEQUENCES)
    assert len({row.line for row in ROWS}) == len(ROWS) >= 25
    assert all(set(servers) <= set(SERVERS) and servers for servers in CONSEQUENCES.values())


def comol_adapter(base: Path) -> tuple[dict[str, torch.Tensor], CoMoLConfig]:
    config = CoMoLConfig(r=4, lora_alpha=8, num_experts=2, target_modules=["q_proj"], base_model_name_or_path=str(base))
    generator = torch.Generator().manual_seed(0)
    shapes = {"comol_A": (4, 32), "comol_B": (32, 4), "comol_cores": (2, 4, 4), "comol_router": (2, 4)}
    tensors = {
        f"{LAYER_0[:-1]}{layer}.self_attn.q_proj.{name}": torch.randn(shape, generator=generator)
        for layer in range(LAYERS)
        for name, shape in shapes.items()
    }
    return tensors, config


def test_the_portable_form_is_fine_for_every_server_with_and_without_its_base(folder, base):
    fine = {server: [] for server in SERVERS}
    assert check_servers(folder) == check_servers(folder, base=base) == fine
    config_edit(base_model_name_or_path="someone/elsewhere")(folder)
    assert check_servers(folder) == fine


def test_a_configuration_that_peft_wrote_is_fine_for_every_server(folder, base):
    LoraConfig(r=RANK, lora_alpha=RANK, target_modules=NAMES, base_model_name_or_path=str(base)).save_pretrained(folder)
    assert check_servers(folder) == {server: [] for server in SERVERS}


ABSURD = [10**9, -3, 0, 1.5, 1e308, 10**400, float("nan"), True, None, "4", "x" * 100_000, [], [1], ["("], {"a\nb": 1}]


@pytest.mark.parametrize("form", ["lora", "gated"])
def test_no_value_of_the_configuration_crashes_the_validator(form, folder, tmp_path, base):
    if form == "gated":
        folder = tmp_path / "vllm"
        vllm_lora.write_vllm_lora(*comol_adapter(base), base, folder)
    path = folder / "adapter_config.json"
    good = json.loads(path.read_text()) | {"base_model_name_or_path": "someone/elsewhere"}  # reading one takes 20 ms
    for name in {*good, "rank_pattern", "alpha_pattern", "use_rslora", "layers_to_transform", "init_lora_weights"}:
        for value in ABSURD:
            path.write_text(json.dumps(good | {"use_rslora": True, name: value}))
            lines = [line for lines in check_servers(folder).values() for line in lines]
            assert all("\n" not in line and len(line) < 1500 for line in lines), (name, value)
    for sizes in ({"r": -4}, {"num_experts": -3}, {"r": -4, "num_experts": -3}, {"r": 0}, {"r": None}, {"r": 1.5}):
        if form == "gated":
            path.write_text(json.dumps(good | {"comol": good["comol"] | sizes}))
            assert "whose product it must be" in check_folder(folder, "vllm")[0]


def test_names_of_tensors_stay_on_one_line(folder):
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file) | {"a\nb" * 10_000: torch.ones(1)}, file)
    [line] = check_folder(folder, "vllm")
    assert "a b" in line and "\n" not in line and len(line) < 1500


def test_the_lora_that_the_export_writes_is_fine_for_every_server(tmp_path, base):
    tensors = portable_tensors()
    module = "model.layers.1.self_attn.q_proj"
    static = StaticLora({module: tensors[f"{Q0}.lora_A.weight"]}, {module: tensors[f"{Q0}.lora_B.weight"]}, RANK)
    write_lora(static, base, tmp_path / "static")
    assert check_servers(tmp_path / "static", base=base) == {server: [] for server in SERVERS}


def test_a_comol_adapter_is_fine_for_peft_alone(tmp_path, base):
    write_adapter(*comol_adapter(base), tmp_path / "comol")
    assert [server for server, problems in check_servers(tmp_path / "comol").items() if not problems] == ["peft"]


def test_the_form_for_vllm_is_fine_for_vllm_alone(tmp_path, base):
    vllm_lora.write_vllm_lora(*comol_adapter(base), base, tmp_path / "vllm")
    assert [server for server, problems in check_servers(tmp_path / "vllm").items() if not problems] == ["vllm"]
    assert vllm_lora.CONFIG_KEY == GATED_KEY and vllm_lora.GUARD.startswith(GUARD_PREFIX)


def test_a_transposed_matrix_is_found_without_the_base(folder):
    config_edit("base_model_name_or_path")(folder)
    put(f"{Q0}.lora_A.weight", lambda tensor: tensor.T)(folder)
    put(f"{O1}.lora_B.weight", lambda tensor: tensor.T)(folder)
    kinds = [line.split(" has shape ")[1].split(";")[0] for line in check_folder(folder, "vllm")]
    assert sorted(kinds) == ["[32, 8], not [r, in_features]", "[8, 32], not [out_features, r]"]


def test_names_that_the_base_has_fused_are_no_fault(folder, base):
    fuse(["gate_proj", "up_proj"], "gate_up_proj")(folder)
    fuse(["q_proj", "k_proj", "v_proj"], "qkv_proj")(folder)
    config_edit(target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"])(folder)
    assert len(check_folder(folder, "vllm")) == 2
    settings = json.loads((base / "config.json").read_text()) | {"model_type": "phi3", "pad_token_id": 0}
    (base / "config.json").write_text(json.dumps(settings))
    assert check_folder(folder, "vllm") == []


def test_any_json_in_the_configuration_gets_an_answer(folder):
    config = portable_config(Path("elsewhere"))
    keys = [*config, "rank_pattern", "alpha_pattern", "comol", "layers_to_transform", "use_rslora"]
    for key in keys:
        for value in (None, True, 0, -1, 2.5, "(", [], [1], {}, {"(": "x"}):
            write(folder, config | {key: value}, None)
            assert all("\n" not in line for problems in check_servers(folder).values() for line in problems)


def test_a_writer_refuses_with_the_first_problem_and_the_number_of_others(folder):
    validate_folder(folder)
    config_edit(bias="all", use_dora=True, modules_to_save=["lm_head"])(folder)
    with pytest.raises(UserError) as error:
        validate_folder(folder, ("peft", "vllm"))
    first = check_folder(folder, "vllm")[0]
    assert str(error.value) == f"{first} (2 more: python launch/export.py --check {folder} --for vllm)"


@pytest.mark.parametrize("row", [row for row in ROWS if row.kind in LIMITS], ids=lambda row: row.kind)
def test_a_writer_does_not_refuse_what_it_cannot_write_otherwise(row, folder):
    row.plant(folder)
    assert check_folder(folder, row.server)
    validate_folder(folder)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("{F}", "ollama"), "--for ollama: choose from vllm, sglang, tgi, llamacpp, peft"),
        (("{F}/none", "vllm"), "{F}/none is not a folder; give an adapter folder"),
        (
            ("{F}", "vllm", "{F}"),
            "base model '{F}' cannot be read; give the folder of the model the adapter was",
        ),
    ],
)
def test_what_cannot_be_checked_is_refused(arguments, line, folder):
    with pytest.raises(UserError) as error:
        check_folder(*(argument.replace("{F}", str(folder)) for argument in arguments))
    assert str(error.value).startswith(line.replace("{F}", str(folder))) and "\n" not in str(error.value)
