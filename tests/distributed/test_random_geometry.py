"""A configuration without weights trains under ZeRO-3 and under tensor parallelism."""

import json
import math

import pytest

from tests.distributed.launching import REPOSITORY, run_deepspeed

VOCABULARY = 2048
GEOMETRY = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 128, "intermediate_size": 256,
    "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": VOCABULARY,
}  # fmt: skip


@pytest.mark.exhaustive
@pytest.mark.distributed
@pytest.mark.parametrize("ds_config", ["zero3", "zero3_tp2"])
def test_trains(ds_config, tmp_path, extensions, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets_cache"))
    (tmp_path / "config.json").write_text(json.dumps(GEOMETRY))
    demo = REPOSITORY / "comol_ds" / "demo"
    flags = {
        "ds_config": REPOSITORY / "ds_configs" / f"{ds_config}.json", "model_name_or_path": tmp_path / "config.json",
        "init_random": "true", "tokenizer_name": demo / "model", "dataset": demo / "data" / "train.jsonl",
        "eval_dataset": demo / "data" / "validation.jsonl", "max_train_records": 64, "max_eval_records": 4,
        "max_generate_records": 0, "max_length": 64, "max_steps": 3, "per_device_train_batch_size": 4,
        "bf16": "true", "logging_steps": 1, "output_dir": tmp_path / "out",
    }  # fmt: skip
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    run = run_deepspeed(2, REPOSITORY / "launch" / "train.py", words, extensions)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    # a random model knows nothing: the loss is that of guessing among all words
    assert lines[0]["loss"] == pytest.approx(math.log(VOCABULARY), abs=0.2)
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()
