"""What the tests of launched runs read in a run folder."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from comol_ds.config_parser import parse_run_config
from comol_ds.data.batches import EvalBatches
from comol_ds.data.prepare import prepare_data
from comol_ds.parallel.vocabulary import Vocabulary
from comol_ds.training.loss import count_targets
from tests.token_losses import token_losses


def json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_one_process_reproduces_the_evaluation(model_path: Path, out: Path, generated: int) -> None:
    """The saved adapter beside its base in one process has the loss of the run's last evaluation."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    config = parse_run_config(["--config", str(out / "config.yaml")])
    data = prepare_data(config.data, tokenizer, config.run.seed)
    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(out / "adapter")).eval()
    loss, count = 0.0, 0
    with torch.no_grad():
        for batch in EvalBatches(data.validation, 4, 0, 1, tokenizer.pad_token_id):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            loss += token_losses(logits, batch["labels"], Vocabulary()).sum().item()
            count += count_targets(batch["labels"])
    last = json_lines(out / "evaluations.jsonl")[-1]["tasks"]["all"]
    assert (last["tokens"], last["generated"]) == (count, generated)
    assert last["loss"] == pytest.approx(loss / count, rel=1e-5)
