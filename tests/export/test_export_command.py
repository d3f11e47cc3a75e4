"""launch/export.py: every format from a run folder, what it prints, and what it refuses."""

import errno
import json
import os
import shutil
import stat
import subprocess
import sys

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from comol_ds import load_for_inference
from comol_ds.errors import UserError
from comol_ds.files import hidden_beside
from comol_ds.output_folder import EXPORT_MARK, files_in, write_mark
from comol_ds.serving.command import export, parse
from tests.distributed.launching import REPOSITORY
from tests.trained_adapters import save_run

IDS = torch.arange(3, 43).view(2, 20)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "run"
    return folder, save_run(folder, records=24)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def export_run(run, export_format: str, target, *words: str) -> list[str]:
    return export(parse(["--checkpoint", str(run[0]), "--format", export_format, "--output_dir", str(target), *words]))


def test_comol_is_the_trained_model_bit_by_bit(run, tmp_path):
    lines = export_run(run, "comol", tmp_path / "out")
    assert lines[0] == f"{run[0] / 'adapter'} -> {tmp_path / 'out'}, comol"
    assert torch.equal(logits(load_for_inference(tmp_path / "out")[0]), logits(run[1]))


def test_hf_exact_is_the_trained_model(run, tmp_path):
    export_run(run, "hf-exact", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert (logits(model) - logits(run[1])).abs().max() <= 1e-6


def test_vllm_lora_says_which_rank_the_server_must_take(run, tmp_path):
    lines = export_run(run, "vllm-lora", tmp_path / "out")
    assert "--max-lora-rank 16" in lines[1]
    assert export(parse(["--check", str(tmp_path / "out"), "--for", "vllm"]))[0].endswith("as it is meant")


@pytest.mark.parametrize("core", ["least-squares", "mean-gate"])
def test_lora_is_what_its_report_says(run, core, tmp_path):
    lines = export_run(run, "lora", tmp_path / "out", "--core", core)
    report = json.loads((tmp_path / "out" / "fidelity.json").read_text())
    assert report["exact"] is False and report["core"] == core
    scores = report["scores"]
    assert list(scores) == ["exact", "base", "least-squares", "mean-gate", "written"]
    assert scores["exact"]["kl_from_exact_nats"] == 0 < scores["written"]["kl_from_exact_nats"]
    assert scores["written"]["kl_from_exact_nats"] == pytest.approx(scores[core]["kl_from_exact_nats"], rel=1e-4)
    assert report["calibration"]["records"] == report["held_out"]["records"] == 12
    assert report["calibration"]["sha256"] != report["held_out"]["sha256"]
    assert "KL(exact || it)" in lines[1] and "mean-gate" in lines[1]
    served = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(run[0].parent / "model"), tmp_path / "out")
    assert (logits(served) - logits(run[1])).abs().max() > 1e-3, "an approximation"


def test_merged_is_the_lora_in_the_weights(run, tmp_path):
    for export_format in ("lora", "merged"):
        export_run(run, export_format, tmp_path / export_format)
    base = AutoModelForCausalLM.from_pretrained(run[0].parent / "model")
    expected = logits(PeftModel.from_pretrained(base, tmp_path / "lora"))
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)
    scores = json.loads((tmp_path / "merged" / "fidelity.json").read_text())["scores"]
    assert scores["written"]["kl_from_exact_nats"] == pytest.approx(
        scores["least-squares"]["kl_from_exact_nats"], rel=1e-3
    )


def test_an_export_replaces_an_earlier_one_only_when_asked(run, tmp_path):
    export_run(run, "comol", tmp_path / "out")
    with pytest.raises(UserError) as error:
        export_run(run, "vllm-lora", tmp_path / "out")
    assert str(error.value) == f"{tmp_path / 'out'} exists; choose another --output_dir or add --overwrite_output_dir"
    export_run(run, "vllm-lora", tmp_path / "out", "--overwrite_output_dir")
    assert "lora_A" in (tmp_path / "out" / "adapter_model.safetensors").read_bytes()[:2000].decode(errors="ignore")


@pytest.mark.parametrize("inside", ["adapter", "."])
def test_what_is_read_is_never_written_over(run, inside):
    target = (run[0] / inside).resolve()
    with pytest.raises(UserError, match="choose another --output_dir"):
        export_run(run, "lora", target, "--overwrite_output_dir")
    assert (run[0] / "adapter" / "adapter_model.safetensors").is_file() and (run[0] / "config.yaml").is_file()


@pytest.mark.parametrize("read", ["tokenizer", "data"])
def test_an_export_that_holds_an_input_is_never_replaced(run, read, tmp_path):
    """The tokenizer and the calibration data, not the adapter and the base alone."""
    export_run(run, "comol", tmp_path / "out")
    (tmp_path / "out" / "data.jsonl").write_text((run[0].parent / "validation.jsonl").read_text())
    write_mark(tmp_path / "out", EXPORT_MARK, files_in(tmp_path / "out"))
    copy = shutil.copytree(run[0], tmp_path / "run")
    settings = yaml.safe_load((copy / "config.yaml").read_text())
    words = []
    if read == "tokenizer":
        settings["tokenizer_name"] = str(tmp_path / "out")
    else:
        words = ["--calibration", str(tmp_path / "out" / "data.jsonl")]
    (copy / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError, match=r"out holds .*out.*, which is read; choose another --output_dir"):
        export_run((copy,), "lora", tmp_path / "out", "--overwrite_output_dir", *words)
    assert (tmp_path / "out" / "data.jsonl").is_file()


@pytest.mark.parametrize("export_format", ["comol", "vllm-lora", "lora", "hf-exact", "merged"])
def test_files_get_the_permissions_that_the_umask_gives(run, export_format, tmp_path):
    before = os.umask(0o027)
    try:
        export_run(run, export_format, tmp_path / "out")
    finally:
        os.umask(before)
    base = (run[0].parent / "model" / "model.safetensors").stat()
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    if export_format == "hf-exact":
        assert modes.pop("base_model.safetensors") == stat.S_IMODE(base.st_mode), "the base's own file"
    assert set(modes.values()) == {0o640}, modes
    folders = [path for path in (tmp_path / "out", *(tmp_path / "out").rglob("*")) if path.is_dir()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in folders} == {0o750}, folders


def test_the_file_stands_where_permissions_are_refused(run, tmp_path, monkeypatch):
    """As on a CIFS or FUSE mount; where the mode is right already, none is asked for."""
    asked = []

    def refuse(path, mode):
        asked.append(mode)
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("pathlib.Path.chmod", refuse)
    before = os.umask(0o027)
    try:
        export_run(run, "comol", tmp_path / "out")
        os.umask(0o077)
        export_run(run, "comol", tmp_path / "closed")
    finally:
        os.umask(before)
    assert asked == [0o640]
    assert torch.equal(logits(load_for_inference(tmp_path / "out")[0]), logits(run[1]))


@pytest.mark.parametrize(
    ("name", "reason"), [("file/out", "Not a directory"), ("x" * 250, "File name too long")], ids=["file", "long"]
)
def test_a_name_that_cannot_be_made_is_one_line(run, name, reason, tmp_path, capfd):
    (tmp_path / "file").write_text("content")
    with pytest.raises(UserError, match=f"cannot be written: .*{reason}.*choose another --output_dir"):
        export_run(run, "comol", tmp_path / name)
    assert capfd.readouterr().err == ""


def test_what_cannot_be_deleted_beside_the_folder_ends(tmp_path, monkeypatch):
    tried = []
    monkeypatch.setattr("comol_ds.files.remove_or_warn", lambda path: tried.append(path))
    monkeypatch.setattr("os.path.lexists", lambda path: True)
    assert hidden_beside(tmp_path / "out", "writing") == tried[-1] and len(tried) == 100


def test_settings_that_somebody_edited_are_no_data(run, tmp_path):
    copy = shutil.copytree(run[0], tmp_path / "run")
    settings = yaml.safe_load((copy / "config.yaml").read_text())
    (copy / "config.yaml").write_text(yaml.safe_dump(settings | {"dataset": [3, {"a": "b"}], "eval_dataset": 7}))
    assert export_run((copy,), "comol", tmp_path / "out")[1].startswith("exact")


def test_an_error_half_way_leaves_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr("comol_ds.serving.approximate.score", lambda *_: 1 / 0)
    for export_format in ("lora", "merged"):
        with pytest.raises(ZeroDivisionError):
            export_run(run, export_format, tmp_path / "out" / export_format)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


CHECK = ["--check", "somewhere"]
EXPORT = ["--checkpoint", "somewhere", "--format", "lora", "--output_dir", "out"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "one of the arguments --checkpoint --check --from_authors is required; see --help"),
        (EXPORT[:2], "--output_dir is missing; name the folder to write"),
        ([*EXPORT[:2], *EXPORT[4:]], "--format is missing; give one of comol, hf-exact, vllm-lora, lora, merged"),
        (CHECK, "--check somewhere: give --for with one of vllm, sglang, tgi, llamacpp, peft"),
        ([*EXPORT, "--max_calibration_records", "0"], "--max_calibration_records 0: must be a positive whole number"),
        ([*EXPORT, "--cores", "x"], "unrecognized arguments: --cores x; see --help"),
    ],
)
def test_bad_flags_are_one_line(words, message):
    with pytest.raises(UserError) as error:
        parse(words)
    assert str(error.value) == message


def test_the_command_ends_with_2_and_one_line(tmp_path):
    words = ["--checkpoint", str(tmp_path), "--format", "comol", "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "launch" / "export.py"), *words], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(f"export.py: error: {tmp_path} holds no adapter: ")


def test_a_fault_that_check_finds_ends_with_2_and_says_what_the_server_would_do(run, tmp_path):
    export_run(run, "comol", tmp_path / "out")
    with pytest.raises(UserError, match="peft_type is COMOL"):
        export(parse(["--check", str(tmp_path / "out"), "--for", "sglang"]))
