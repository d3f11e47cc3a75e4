"""What the planner is measured on: a small Llama on two ranks in many layouts, the same for planner and engine."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from comol_ds.config import (
    AdapterSettings,
    DataSettings,
    ModelSettings,
    OptimizerSettings,
    ParallelSettings,
    RunConfig,
    RunSettings,
)
from comol_ds.ds_config import load_ds_json

RANKS, TOKENS, VOCABULARY = 2, 128, 2048
REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Layout:
    """One run on two ranks; ``rows`` is the micro-batch."""

    ds_config: str
    tensor_parallel: int
    checkpointing: str
    bf16: bool = False
    rows: int = 2
    optim: str = "adamw_torch"
    accumulation: int = 1
    router: str = "core"
    dropout: float = 0.0
    gathered: tuple[int, int, int] | None = None  # elements: prefetched, live, reuse distance; None: as in the JSON

    @property
    def name(self) -> str:
        return "-".join(map(str, asdict(self).values()))

    @property
    def global_batch(self) -> int:
        return self.rows * self.accumulation * RANKS // self.tensor_parallel

    def template(self) -> dict:
        """The DeepSpeed JSON."""
        template = load_ds_json(f"{REPOSITORY}/ds_configs/{self.ds_config}.json")
        if template["zero_optimization"]["stage"]:
            template["zero_optimization"]["reduce_bucket_size"] = 100_000  # of 200,000 trainable elements
        if self.gathered is not None:
            names = ("stage3_prefetch_bucket_size", "stage3_max_live_parameters", "stage3_max_reuse_distance")
            template["zero_optimization"] |= dict(zip(names, self.gathered, strict=True))
        return template

    def run_config(self, model: str) -> RunConfig:
        return RunConfig(
            model=ModelSettings(model_name_or_path=model, activation_checkpointing=self.checkpointing, bf16=self.bf16),
            adapter=AdapterSettings(num_experts=4, router=self.router, lora_dropout=self.dropout),
            data=DataSettings(max_length=TOKENS),
            optimizer=OptimizerSettings(
                optim=self.optim, per_device_train_batch_size=self.rows, global_batch_size=self.global_batch
            ),
            parallel=ParallelSettings(tensor_parallel_size=self.tensor_parallel),
            run=RunSettings(ds_config=self.ds_config),
        )


# Without tensor parallelism first: DeepSpeed keeps the mpu of an earlier engine.
LAYOUTS = [
    Layout("zero0", 1, "none"),
    Layout("zero2", 1, "none", bf16=True),
    Layout("zero3", 1, "full", bf16=True),
    Layout("zero3", 1, "none", gathered=(100_000, 2_000_000, 1_000_000)),
    Layout("zero1", 2, "none"),
    Layout("zero2", 2, "full", accumulation=2),
    Layout("zero3", 2, "none", dropout=0.1),
]
MORE_LAYOUTS = [
    Layout("zero1", 1, "full", optim="sgd"),
    Layout("zero2", 1, "selective:2", router="input"),
    Layout("zero3", 1, "none"),
    Layout("zero3", 1, "none", rows=1, accumulation=2, optim="sgd"),
    Layout("zero3", 1, "full", gathered=(0, 0, 0)),
    Layout("zero3_offload", 1, "none", bf16=True),
    Layout("zero0", 2, "full"),
    Layout("zero3", 2, "full", bf16=True),
]
SUITES = {"layouts": LAYOUTS, "more layouts": MORE_LAYOUTS}


def save_model(folder: Path) -> Path:
    """Large enough for the terms that count to dominate."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=TOKENS, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def batch(rows: int) -> dict:
    """Rows of TOKENS tokens, the last of several one shorter, so that there is a mask; all labelled."""
    ids = torch.randint(3, VOCABULARY, (rows, TOKENS))
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[-1, -1] = 0
    labels = ids.masked_fill(mask == 0, -100)
    owners = torch.where(mask.bool(), torch.arange(rows).unsqueeze(1), -1)
    names = [f"row {row}" for row in range(rows)]
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "record_index": owners,
        "record_ids": names,
        "tasks": names,
    }
