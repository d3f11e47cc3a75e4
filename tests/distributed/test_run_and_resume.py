"""The launcher on two ranks with real GSM8K records: every file of the run folder, reload, bit-equal resume."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from comol_ds.adapters.adapter_folder import read_adapter
from comol_ds.adapters.kept_tokenizer import read_tokenizer_files
from comol_ds.output_folder import RUN_MARK
from comol_ds.training.run_folder import WRITTEN
from tests.data.data_helpers import real_data
from tests.distributed.launching import REPOSITORY, clean_environment, free_port, run_deepspeed, run_limited
from tests.distributed.run_folders import assert_one_process_reproduces_the_evaluation, json_lines
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.distributed
STEPS, SAVE_STEPS = 8, 4
# 40 records in global batches of 8: step 6 starts the second epoch, so the resumed run crosses an epoch's end
SETTINGS = {
    "max_steps": STEPS,
    "save_steps": SAVE_STEPS,
    "max_train_records": 40,
    "per_device_train_batch_size": 2,
    "global_batch_size": 8,
    "max_length": 512,
    "max_eval_records": 10,
    "max_generate_records": 4,
    "max_new_tokens": 4,
    "lora_dropout": 0.1,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "cosine",
    "logging_steps": 1,
}


ANSWERS = {"answer_pattern": "#### (-?[0-9.,]+)"}  # of the first run and of those that continue it


def arguments(model: Path, output: Path, *extra: str, **changes) -> list[str]:
    settings = SETTINGS | {
        "ds_config": REPOSITORY / "ds_configs" / "zero3.json",
        "model_name_or_path": model,
        "dataset": real_data("gsm8k/train.jsonl"),
        "output_dir": output,
    }
    return [*(word for name, value in (settings | changes).items() for word in (f"--{name}", str(value))), *extra]


def run_torchrun(words: list[str], extensions: Path) -> subprocess.CompletedProcess:
    port = free_port()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    command = [*launcher, str(REPOSITORY / "launch" / "train.py"), *words]
    return run_limited(command, clean_environment(extensions), 240, REPOSITORY, port)


@pytest.fixture(scope="module")
def first_run(tmp_path_factory, extensions):
    """An uninterrupted run under the deepspeed launcher: (model folder, run folder, its output)."""
    folder = tmp_path_factory.mktemp("run")
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    model = save_tiny_model(folder / "model")
    run = run_deepspeed(2, REPOSITORY / "launch" / "train.py", arguments(model, folder / "out", **ANSWERS), extensions)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    yield model, folder / "out", run.stdout
    del os.environ["HF_DATASETS_CACHE"]


def test_run_folder_holds_everything(first_run):
    _, out, printed = first_run
    assert {path.name for path in out.iterdir()} >= {
        "config.yaml", "ds_config.json", "metrics.jsonl", "router_load.jsonl", "evaluations.jsonl",
        "tensorboard", "checkpoints", "adapter", "generations",
    }  # fmt: skip
    assert {path.name for path in out.iterdir()} <= {RUN_MARK, *WRITTEN}, "an overwrite would leave it"
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert (config["global_batch_size"], config["bf16"], config["lora_dropout"]) == (8, False, 0.1)
    assert json.loads((out / "ds_config.json").read_text())["gradient_accumulation_steps"] == 2
    metrics = json_lines(out / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    assert set(metrics[0]) == {
        "step", "loss", "grad_norm", "lr", "tokens", "tokens_per_second", "memory", "memory_per_rank", "seconds"
    }  # fmt: skip
    for line in metrics:
        assert len(line["memory_per_rank"]) == 2 and line["memory"] == max(line["memory_per_rank"])
        assert min(line["memory_per_rank"]) > 100 * 2**20, "an interpreter with torch takes more"
    load = json_lines(out / "router_load.jsonl")
    steps = range(1, STEPS + 1)
    assert [(line["step"], line["split"]) for line in load] == [*((s, "train") for s in steps), (STEPS, "validation")]
    assert all(len(line["layers"]) == 2 * 5 and line["version"] == 1 for line in load)
    assert [line["tokens"]["all"] for line in load[:-1]] == [line["tokens"] for line in metrics]
    gates = [layer["mean_gate"] for line in load for layer in line["layers"].values()]
    assert all(sum(gate) == pytest.approx(1, abs=1e-5) for gate in gates)
    assert list((out / "tensorboard").iterdir())
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step_4", "step_8"]
    assert all((path / "COMMITTED").exists() for path in (out / "checkpoints").iterdir())
    assert "exact match" in printed and str(out / "adapter") in printed
    assert printed.count("held-out records") == 1, "only rank 0 prints"


def test_adapters_keep_the_tokenizer_and_the_template_of_the_data(first_run):
    _, out, _ = first_run
    kept = read_tokenizer_files(out / "adapter")
    asked = AutoTokenizer.from_pretrained(out / "adapter").apply_chat_template(
        [{"role": "user", "content": "How many?"}], add_generation_prompt=True, tokenize=False
    )
    # the base has no chat template, so that GSM8K's questions are Alpaca's instructions
    assert asked.endswith("### Instruction:\nHow many?\n\n### Response:\n"), asked
    assert "tokenizer.json" in kept
    for step in (SAVE_STEPS, STEPS):
        assert read_tokenizer_files(out / "checkpoints" / f"step_{step}" / "adapter") == kept


def test_files_get_the_permissions_that_the_umask_gives(first_run):
    model, out, _ = first_run
    os.umask(umask := os.umask(0))
    files = [path for folder in (out, model.parent / "cache") for path in folder.rglob("*") if path.is_file()]
    other = {str(path): oct(mode) for path in files if (mode := path.stat().st_mode & 0o777) != 0o666 & ~umask}
    assert other == {} and len(files) > 20


def test_every_generated_answer_is_written(first_run):
    _, out, printed = first_run
    answers = json_lines(out / "generations.jsonl")
    assert [set(answer) for answer in answers] == [
        {"step", "record", "task", "prompt", "reference", "answer", "match"}
    ] * 4
    assert all(answer["step"] == STEPS and "####" in answer["reference"] and answer["prompt"] for answer in answers)
    assert len({answer["record"] for answer in answers}) == 4, "each is answered by one of the ranks"
    assert "exact match: 4 of 4 references are longer than --max_new_tokens 4 and no answer can equal" in printed


def test_checkpoints_hold_no_frozen_weight(first_run):
    model, out, _ = first_run
    frozen = {tuple(tensor.shape) for tensor in AutoModelForCausalLM.from_pretrained(model).state_dict().values()}
    files = sorted((out / "checkpoints" / "step_4" / "deepspeed").glob("*model_states.pt"))
    names = {name for file in files for name in torch.load(file, weights_only=False)["module"]}
    assert files and frozen
    assert names and all("comol_" in name for name in names)


def test_one_process_reproduces_the_evaluation(first_run):
    model, out, _ = first_run
    assert_one_process_reproduces_the_evaluation(model, out, generated=4)


def test_resume_falls_back_to_the_committed_one_and_is_bit_equal(first_run, tmp_path, extensions):
    """The newest checkpoint is damaged: a run started by torchrun goes on from the one before and ends the same."""
    model, out, _ = first_run
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    shutil.rmtree(copy / "adapter")
    damaged = next((copy / "checkpoints" / "step_8" / "deepspeed").glob("*optim_states.pt"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    run = run_torchrun(arguments(model, copy, "--resume_from_checkpoint", **ANSWERS), extensions)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    assert f"step_8 is not usable: the content of deepspeed/{damaged.name} is not what was written" in run.stdout
    assert f"resumed from {copy / 'checkpoints' / 'step_4'}: step 4 of 8, by DeepSpeed's own files" in run.stdout
    before, after = json_lines(out / "metrics.jsonl"), json_lines(copy / "metrics.jsonl")
    bits = [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in before]
    assert [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in after] == bits
    assert json_lines(copy / "router_load.jsonl") == json_lines(out / "router_load.jsonl")
    assert json_lines(copy / "evaluations.jsonl") == json_lines(out / "evaluations.jsonl")
    expected, found = read_adapter(out / "adapter")[1], read_adapter(copy / "adapter")[1]
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert found.keys() == expected.keys()


@pytest.mark.exhaustive
def test_resume_on_another_layout_says_so_and_continues_the_logs(first_run, tmp_path, extensions):
    """Two data-parallel ranks under ZeRO-3 become one tensor-parallel pair under ZeRO-1."""
    model, out, _ = first_run
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    shutil.rmtree(copy / "checkpoints" / "step_8")
    layout = {"tensor_parallel_size": 2, "ds_config": REPOSITORY / "ds_configs" / "zero1.json"}
    words = arguments(model, copy, "--resume_from_checkpoint", **ANSWERS, **layout)
    run = run_deepspeed(2, REPOSITORY / "launch" / "train.py", words, extensions)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    assert (
        "step 4 of 8, by the canonical state (another layout: tensor_parallel 1 -> 2, zero_stage 3 -> 1; dropout draws"
        " new masks)" in run.stdout
    )
    before, after = json_lines(out / "metrics.jsonl"), json_lines(copy / "metrics.jsonl")
    assert [(line["step"], line["lr"], line["tokens"]) for line in after] == [
        (line["step"], line["lr"], line["tokens"]) for line in before
    ]
    assert after[:4] == before[:4] and after[4:] != before[4:]


@pytest.mark.slow
def test_starts_from_slurm_variables(first_run, tmp_path, extensions):
    """srun sets no RANK: two plain python processes with SLURM's variables form one world of two."""
    model, _, _ = first_run
    port = free_port()
    words = [str(REPOSITORY / "launch" / "train.py"), *arguments(model, tmp_path / "out", max_steps=1)]
    environment = clean_environment(extensions) | {
        "SLURM_NTASKS": "2", "SLURM_JOB_ID": "17", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, *words], env=environment | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        printed = [rank.communicate(timeout=200)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
        leftovers = list(Path("/dev/shm").glob(f"deepspeed_*_{port}_*"))
        for leftover in leftovers:
            leftover.unlink(missing_ok=True)
    assert [rank.returncode for rank in ranks] == [0, 0], printed[0][-3000:]
    assert leftovers == [], "every rank deletes its own shared-memory files"
    assert "2 micro x 2 accumulation x 2 data-parallel = 8 global" in printed[0]
    assert "data-parallel" not in printed[1]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(first_run, tmp_path, extensions):
    """The second step meets weights of 1e30: the run ends before that update and names the records."""
    model, _, _ = first_run
    words = arguments(model, tmp_path / "out", learning_rate=1e30, optim="sgd", max_grad_norm=0)
    run = run_deepspeed(2, REPOSITORY / "launch" / "train.py", words, extensions)
    assert run.returncode not in (0, 2, 75)
    assert "step 2: loss is nan; records of the batch: gsm8k/train:" in run.stdout + run.stderr
    assert not (tmp_path / "out" / "adapter").exists()
