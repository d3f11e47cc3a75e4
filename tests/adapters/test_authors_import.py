"""Import of the authors' checkpoint layout, against their equation written out for their tensors."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from comol_ds.adapters.adapter_folder import read_adapter
from tests.adapters.models import tiny_llama, tokens

ROOT = Path(__file__).parents[2]
R, E, ALPHA = 4, 3, 8
TARGETS = ("q_proj", "down_proj")


def run_export(source, output_dir, *flags):
    return subprocess.run(
        [sys.executable, "launch/export.py", "--from_authors", str(source), "--output_dir", str(output_dir), *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def in_process(source, output_dir, *flags):
    """The same command without a new interpreter, which takes seconds to import torch."""
    main = runpy.run_path(str(ROOT / "launch" / "export.py"))["main"]
    return main(["--from_authors", str(source), "--output_dir", str(output_dir), *flags])


def authors_tensors(core_router):
    generator = torch.Generator().manual_seed(9)
    tensors = {}
    for name, module in tiny_llama().named_modules():
        if name.rpartition(".")[2] in TARGETS:
            i, o = module.in_features, module.out_features
            shapes = {f"lora_Cores.{expert}": (R, R) for expert in range(E)}
            shapes |= {"lora_A.weight": (R, i), "lora_B.weight": (o, R)}
            shapes["lora_router.weight"] = (E, R if core_router else i)
            for key, shape in shapes.items():
                tensors[f"base_model.model.{name}.{key}"] = torch.randn(shape, generator=generator) * 0.3
    return tensors


def write_authors_folder(folder, core_router=True, tensors=None, **changed):
    folder.mkdir(parents=True)
    config = {
        "peft_type": "MoCoreLORA",
        "lora_rank": R,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.1,
        "num_experts": E,
        "core_router": core_router,
        "target_modules": list(TARGETS),
        "task_type": "CAUSAL_LM",
        **changed,
    }
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    torch.save(authors_tensors(core_router) if tensors is None else tensors, folder / "adapter_model.bin")
    return folder


def attach_literally(model, tensors, core_router):
    """Forward hooks that add s * (h M) B^T, one token at a time, from the authors' own tensors."""

    def hook_for(prefix):
        a, b, route = (tensors[f"{prefix}.lora_{name}.weight"] for name in ("A", "B", "router"))
        cores = [tensors[f"{prefix}.lora_Cores.{expert}"] for expert in range(E)]

        def hook(_, args, output):
            rows = []
            for token in args[0].reshape(-1, args[0].shape[-1]):
                h = a @ token
                p = torch.softmax(route @ (h if core_router else token), 0)
                merged = sum(p[e] * cores[e] for e in range(E))
                rows.append(b @ (h @ merged) * (ALPHA / R))
            return output + torch.stack(rows).reshape(output.shape)

        return hook

    for name, module in model.named_modules():
        if name.rpartition(".")[2] in TARGETS:
            module.register_forward_hook(hook_for(f"base_model.model.{name}"))
    return model


@pytest.mark.parametrize("core_router", [True, False])
def test_imported_adapter_computes_the_authors_equation(tmp_path, core_router):
    source = write_authors_folder(tmp_path / "authors", core_router)
    assert in_process(source, tmp_path / "ours") == 0
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours").eval()
    config = model.peft_config["default"]
    assert (config.router, config.dropout_scheme, config.lora_dropout) == (
        "core" if core_router else "input",
        "paper",
        0.1,
    )
    literal = attach_literally(tiny_llama(), authors_tensors(core_router), core_router)
    with torch.no_grad():
        ours, theirs = model(input_ids=tokens()).logits, literal(input_ids=tokens()).logits
        base = tiny_llama()(input_ids=tokens()).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (theirs - base).abs().max() > 1e-2


@pytest.mark.slow
def test_the_command(tmp_path):
    source = write_authors_folder(tmp_path / "authors")
    done = run_export(source, tmp_path / "ours")
    assert done.returncode == 0, done.stderr
    assert "CoMoL adapter, r=4, 3 experts, router=core" in done.stdout
    again = run_export(source, tmp_path / "ours")
    assert again.returncode == 2
    assert again.stderr.strip().splitlines() == [
        f"export.py: error: {tmp_path / 'ours'} exists; choose another --output_dir or add --overwrite_output_dir"
    ]


def test_an_existing_adapter_is_replaced_on_request(tmp_path):
    assert in_process(write_authors_folder(tmp_path / "first"), tmp_path / "ours") == 0
    old = read_adapter(tmp_path / "ours")[1]
    double = {key: 2 * value for key, value in authors_tensors(True).items()}
    second = write_authors_folder(tmp_path / "second", tensors=double)
    assert in_process(second, tmp_path / "ours", "--overwrite_output_dir") == 0
    new = read_adapter(tmp_path / "ours")[1]
    assert all(torch.equal(new[key], 2 * old[key]) for key in old)


def test_a_folder_that_is_no_export_is_never_written_over(tmp_path, capsys):
    source, mine = write_authors_folder(tmp_path / "authors"), tmp_path / "mine"
    mine.mkdir()
    (mine / "adapter_model.safetensors").write_text("mine")
    for target in (mine, source):
        before = {path: path.read_bytes() for path in target.iterdir()}
        assert in_process(source, target, "--overwrite_output_dir") == 2
        assert "choose another --output_dir" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in target.iterdir()} == before


class Malicious:
    """Pickles into a call that creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, capsys):
    source = write_authors_folder(tmp_path / "authors", tensors={"x": Malicious(tmp_path / "pwned")})
    assert in_process(source, tmp_path / "ours") == 2
    assert "holds more than tensors" in capsys.readouterr().err
    assert not (tmp_path / "pwned").exists() and not (tmp_path / "ours").exists()


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def without(key):
    return {name: value for name, value in authors_tensors(True).items() if name != f"{Q0}.{key}"}


def changed(key, value):
    return {**authors_tensors(True), f"{Q0}.{key}": value}


BAD_FOLDERS = {
    "wrong type": ({"peft_type": "LORA"}, "peft_type 'LORA', expected 'MoCoreLORA'"),
    "no rank": ({"lora_rank": None}, "lacks lora_rank"),
    "rank is text": ({"lora_rank": "four"}, "is 'four'; it must be a whole number"),
    "another rank": ({"lora_rank": 8}, "has rank 4 and 3 experts, the configuration says r=8"),
    "more experts": ({"num_experts": 5}, "has 3 cores, the configuration says num_experts=5; missing: lora_Cores.3"),
    "fewer experts": ({"num_experts": 2}, "has 3 cores, the configuration says num_experts=2"),
    "a core missing": ({"tensors": without("lora_Cores.1")}, "has 2 cores, .* missing: lora_Cores.1"),
    "no A": ({"tensors": without("lora_A.weight")}, "q_proj has no lora_A.weight"),
    "another router": ({"core_router": False, "tensors": "core"}, "comol_router has I=4"),
    "uneven cores": ({"tensors": ("lora_Cores.0", torch.ones(2, 2))}, "cores of different shapes"),
    "nan": ({"tensors": ("lora_B.weight", torch.full((32, R), torch.nan))}, "not finite"),
    "foreign key": ({"tensors": ("lora_C.weight", torch.ones(2))}, "is not a tensor of a MoCoreLORA adapter"),
    "no dictionary": ({"tensors": [torch.ones(2)]}, "holds no tensors"),
}


@pytest.mark.parametrize(("folder", "message"), BAD_FOLDERS.values(), ids=BAD_FOLDERS.keys())
def test_bad_folders_are_one_line_errors(tmp_path, capsys, folder, message):
    tensors = folder.get("tensors")
    if tensors == "core":
        folder = {**folder, "tensors": authors_tensors(True)}
    elif isinstance(tensors, tuple):
        folder = {**folder, "tensors": changed(*tensors)}
    source = write_authors_folder(tmp_path / "authors", **folder)
    assert in_process(source, tmp_path / "ours") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error
    assert not (tmp_path / "ours").exists()


def test_missing_and_truncated_files(tmp_path, capsys):
    def error_of(source):
        assert in_process(source, tmp_path / "ours") == 2
        return capsys.readouterr().err

    assert "adapter_config.json is missing" in error_of(tmp_path / "nowhere")
    source = write_authors_folder(tmp_path / "authors")
    weights = source / "adapter_model.bin"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 3])
    assert "cannot be read" in error_of(source)
    weights.write_bytes(b"")
    assert "adapter_model.bin" in error_of(source)
    weights.unlink()
    assert "adapter_model.bin is missing" in error_of(source)
    (tmp_path / "file").write_text("")
    assert in_process(source, tmp_path / "file", "--overwrite_output_dir") == 2
    assert "is a file" in capsys.readouterr().err
