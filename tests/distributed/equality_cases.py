"""What the equality test trains: the same steps in one plain PyTorch process and under DeepSpeed."""

from dataclasses import asdict, dataclass

from comol_ds.config import AdapterSettings, ModelSettings, OptimizerSettings, RunConfig, RunSettings

STEPS = 6
GLOBAL_BATCH = 8


@dataclass(frozen=True)
class Case:
    """One combination that must equal one process."""

    ds_config: str
    accumulation: int
    optim: str
    checkpointing: str
    family: str = "llama"
    router: str = "core"
    bf16: bool = False
    dropout: float = 0.0
    train_head: bool = False

    @property
    def name(self) -> str:
        return "-".join(map(str, asdict(self).values()))

    def run_config(self, models: str) -> RunConfig:
        """Settings of this case; ``models`` holds one model folder per family."""
        # SGD without Adam's normalization shows a wrong gradient scale; clipping at 0.05 is active in every step
        learning_rate = 0.5 if self.optim == "sgd" else 5e-3
        return RunConfig(
            model=ModelSettings(
                model_name_or_path=f"{models}/{self.family}", activation_checkpointing=self.checkpointing
            ),
            adapter=AdapterSettings(
                r=4,
                lora_alpha=8,
                num_experts=3,
                target_modules=["all-linear"],
                core_init="orthogonal",
                router=self.router,
                lora_dropout=self.dropout,
                modules_to_save=["lm_head"] if self.train_head else None,
            ),
            optimizer=OptimizerSettings(
                learning_rate=learning_rate,
                optim=self.optim,
                weight_decay=0.01,
                max_grad_norm=0.05,
                lr_scheduler_type="cosine",
                warmup_steps=2,
                max_steps=STEPS,
                global_batch_size=GLOBAL_BATCH,
            ),
            run=RunSettings(ds_config=f"ds_configs/{self.ds_config}.json", seed=7),
        )


CASES = [
    *(
        Case(ds_config, accumulation, optim, checkpointing)
        for ds_config in ("zero1", "zero2", "zero3")
        for accumulation in (1, 4)
        for optim in ("adamw_torch", "sgd")
        for checkpointing in ("none", "full")
    ),
    Case("zero3_offload", 1, "adamw_torch", "none"),
    Case("zero3_offload", 4, "sgd", "full"),
    *(Case("zero3", 1, "adamw_torch", "full", family) for family in ("qwen3", "mistral", "gemma3")),
    *(Case(ds_config, 1, "sgd", "none", router="input") for ds_config in ("zero2", "zero3")),
    Case("zero3", 1, "sgd", "none", train_head=True),
]

# Bfloat16 cannot equal fp32; it has a test of its own.
BF16_CASES = [Case(ds_config, 1, "adamw_torch", "none", bf16=True) for ds_config in ("zero2", "zero3")]

RESUME_CASES = [
    Case(ds_config, 2, "adamw_torch", "none", dropout=0.1) for ds_config in ("zero1", "zero2", "zero3", "zero3_offload")
]
