"""One rank of the HF Trainer test: a CoMoL PeftModel under transformers.Trainer with our ZeRO-3 JSON.

Usage: deepspeed trainer_worker.py MODEL OUTPUT_FOLDER
"""

import os
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402
from accelerate import PartialState  # noqa: E402
from peft import get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments  # noqa: E402

from comol_ds import CoMoLConfig  # noqa: E402
from comol_ds.parallel.groups import exit_process  # noqa: E402
from comol_ds.router_load.trainer_callback import RouterLoadCallback  # noqa: E402
from tests.tiny_models import random_batch  # noqa: E402


def main() -> None:
    model_path, output = sys.argv[-2:]
    # Only on a machine without accelerators: left alone, accelerate knows no backend there and takes every rank for a
    # world of one. On GPUs Trainer needs none of this.
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    arguments = TrainingArguments(
        output_dir=output,
        accelerator_config={"use_configured_state": True},
        deepspeed=str(REPOSITORY / "ds_configs" / "zero3.json"),
        per_device_train_batch_size=2,
        learning_rate=5e-3,
        max_steps=4,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        seed=3,
    )
    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    model = get_peft_model(base, CoMoLConfig(task_type="CAUSAL_LM", r=4, num_experts=3, target_modules="all-linear"))
    rows = random_batch(16, seed=0)
    records = [{name: rows[name][i] for name in ("input_ids", "labels", "attention_mask")} for i in range(16)]
    trainer = Trainer(model=model, args=arguments, train_dataset=records, callbacks=[RouterLoadCallback()])
    trainer.train()
    trainer.save_model()
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        torch.save(losses, Path(output) / "losses.pt")


if __name__ == "__main__":
    main()
    exit_process(0)
