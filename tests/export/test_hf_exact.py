"""hf-exact checkpoints: loaded without comol_ds they compute what was trained."""

import ast
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from comol_ds.adapters.adapter_folder import read_adapter
from comol_ds.export import hf_exact, hf_exact_model
from comol_ds.export.hf_exact import ADAPTER_FILE
from tests.export import hf_exact_reader
from tests.export.hf_exact_cases import CASES, export, train

INPUT_IDS = torch.randint(3, 400, (2, 24), generator=torch.Generator().manual_seed(5))


@dataclass(frozen=True)
class Outcome:
    folder: Path
    trained: torch.nn.Module
    report: hf_exact.HfExactReport
    read: dict


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Every case exported, and read in one process that has no comol_ds."""
    root = tmp_path_factory.mktemp("hf_exact")
    folders = {name: root / str(number) for number, name in enumerate(CASES)}
    trained = {name: train(folders[name], case) for name, case in CASES.items()}
    reports = {name: export(folder) for name, folder in folders.items()}
    job = {
        "folders": [str(folder / "served") for folder in folders.values()],
        "input_ids": INPUT_IDS.tolist(),
        "scratch": str(root / "scratch"),
    }
    (root / "job.json").write_text(json.dumps(job))
    command = [sys.executable, "-I", hf_exact_reader.__file__, str(root / "job.json"), str(root / "results.pt")]
    environment = os.environ | {"HF_HOME": str(root / "hf"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    read = torch.load(root / "results.pt")
    return {
        name: Outcome(folders[name], trained[name], reports[name], one) for name, one in zip(CASES, read, strict=True)
    }


@pytest.fixture
def outcome(request, outcomes):
    return outcomes[request.param]


every_case = pytest.mark.parametrize("outcome", CASES, indirect=True)


@every_case
def test_logits_are_those_of_the_trained_model(outcome):
    with torch.no_grad():
        expected = outcome.trained(input_ids=INPUT_IDS).logits
        with outcome.trained.disable_adapter():
            base = outcome.trained(input_ids=INPUT_IDS).logits
    assert (expected - base).abs().max() > 0.05  # else the adapter does not act, and nothing is tested
    assert (outcome.read["logits"] - expected).abs().max() <= 1e-6


@every_case
def test_generation_is_that_of_the_trained_model(outcome):
    expected = outcome.trained.generate(input_ids=INPUT_IDS[:, :3], max_new_tokens=5, do_sample=False)
    assert outcome.read["generated"].tolist() == expected.tolist()
    assert outcome.read["text"]


@every_case
def test_transformers_finds_every_tensor_and_needs_every_tensor(outcome):
    assert not any(outcome.read["problems"].values())


@every_case
def test_saved_again_it_has_the_names_of_the_base_and_the_same_logits(outcome):
    assert not any("base_layer" in name for name in outcome.read["saved_names"])
    assert torch.equal(outcome.read["logits_again"], outcome.read["logits"])


@every_case
def test_the_files_of_the_base_are_shared(outcome):
    served = {path.stat().st_ino for path in (outcome.folder / "served").glob("*.safetensors")}
    base = list((outcome.folder / "base").glob("*.safetensors"))
    assert served > {path.stat().st_ino for path in base}
    assert outcome.report.linked_bytes == sum(path.stat().st_size for path in base) and not outcome.report.copied_bytes


@pytest.mark.parametrize("outcome", ["llama, bfloat16"], indirect=True)
def test_beside_a_bfloat16_base_the_adapter_stays_in_float32(outcome):
    kinds = {dtype for name, dtype in outcome.read["dtypes"].items() if "comol_" in name}
    others = {dtype for name, dtype in outcome.read["dtypes"].items() if "comol_" not in name}
    assert kinds == {"torch.float32"} and others == {"torch.bfloat16"}


@pytest.mark.parametrize("outcome", ["llama, biases and one layer"], indirect=True)
def test_only_the_adapted_layers_have_an_adapter(outcome):
    names = {name for name in outcome.read["dtypes"] if "comol_" in name}
    assert len(names) == 4 * 4 and all(name.startswith("model.layers.1.") for name in names)
    assert outcome.report.modules == 4


@pytest.mark.parametrize("outcome", ["llama"], indirect=True)
def test_the_adapter_is_written_as_it_is(outcome):
    _, tensors = read_adapter(outcome.folder / "adapter")
    written = load_file(outcome.folder / "served" / ADAPTER_FILE)
    assert len(written) == len(tensors)
    for key, tensor in tensors.items():
        name = key.removeprefix("base_model.model.")
        assert torch.equal(written[name if name.endswith("cores") else f"{name}.weight"], tensor)


@pytest.mark.parametrize("outcome", ["llama, shards"], indirect=True)
def test_the_index_lists_every_tensor_of_every_file(outcome):
    folder = outcome.folder / "served"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found, size = {}, 0
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        found |= dict.fromkeys(tensors, path.name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    assert index == {"metadata": {"total_size": size}, "weight_map": found}
    assert len(set(found.values())) > 3


def test_the_modelling_code_imports_torch_and_transformers_only():
    tree = ast.parse(Path(hf_exact_model.__file__).read_text())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {name.partition(".")[0] for name in names} == {"torch", "transformers", "typing"}


@pytest.mark.parametrize("family", hf_exact.FAMILIES)
def test_the_modelling_code_builds_on_the_classes_of_the_family(family):
    imported = [line.split() for line in hf_exact.modelling_code(family).splitlines() if " as Base" in line]
    stem = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral", "gemma3_text": "Gemma3"}[family]
    text = "Text" if family == "gemma3_text" else ""
    assert [line[3] for line in imported] == [f"{stem}{text}Config", f"{stem}ForCausalLM", f"{stem}{text}Model"]


def test_what_is_split_over_ranks_is_summed_before_it_is_routed_on():
    config = hf_exact_model.CoMoLModelConfig(
        comol_router="input", comol_modules={"self_attn.q_proj": [0], "mlp.down_proj": [0, 1]}
    )
    hf_exact_model.declare_names(config)
    layer = {
        name.removeprefix("layers.*."): style
        for name, style in config.base_model_tp_plan.items()
        if "q_proj" in name or "mlp" in name
    }
    assert layer == {
        "self_attn.q_proj.base_layer": "colwise",
        "self_attn.q_proj.comol_B": "colwise",
        "mlp.gate_proj": "colwise",
        "mlp.up_proj": "colwise",
        "mlp.down_proj.base_layer": "rowwise",
        "mlp.down_proj.comol_A": "rowwise",
        "mlp.down_proj.comol_router": "rowwise",
    }
    once = dict(config.base_model_tp_plan)
    hf_exact_model.declare_names(config)  # the decoder declares again what the language model has declared
    assert config.base_model_tp_plan == once
