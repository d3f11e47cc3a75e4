"""What the equality test trains: the same steps in one plain PyTorch process and under DeepSpeed."""

from dataclasses import asdict, dataclass
from typing import Any

from comol_ds.config import (
    AdapterSettings,
    ModelSettings,
    OptimizerSettings,
    ParallelSettings,
    RouterSettings,
    RunConfig,
    RunSettings,
)
from tests.tiny_models import left_padded, random_batch, random_packed_batch

TASKS = ("even", "odd")  # of the random batches
# each strong enough to change where the training ends
ROUTER_LOSSES = {"router_aux_loss_coef": 20.0, "router_z_loss_coef": 0.2, "core_diversity_loss_coef": 0.1}


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
    tensor_parallel: int = 1
    r: int = 4
    steps: int = 6
    global_batch: int = 8
    targets: str = "all-linear"
    tp_plan: str | None = None
    offload: str = "none"
    partition: bool = False
    batches: str = "right"  # where the padding is: right, left, or packed rows
    router_losses: tuple[str, ...] = ()  # names among ROUTER_LOSSES

    @property
    def name(self) -> str:
        values = asdict(self) | {"router_losses": bool(self.router_losses)}
        return "-".join(map(str, values.values()))

    def batch(self, step: int) -> dict:
        """The global batch of a step."""
        if self.batches == "packed":
            return random_packed_batch(self.global_batch, seed=step)
        batch = random_batch(self.global_batch, seed=step)
        return left_padded(batch) if self.batches == "left" else batch

    def run_config(self, models: str) -> RunConfig:
        """Settings of this case; ``models`` holds one model folder per family, and plan files."""
        # SGD without Adam's normalization shows a wrong gradient scale; clipping at 0.05 is active in every step
        learning_rate = 0.5 if self.optim == "sgd" else 5e-3
        return RunConfig(
            model=ModelSettings(
                model_name_or_path=f"{models}/{self.family}",
                activation_checkpointing=self.checkpointing,
                activation_offload=self.offload,
                partition_activations=self.partition,
            ),
            adapter=AdapterSettings(
                r=self.r,
                lora_alpha=8,
                num_experts=3,
                target_modules=self.targets.split(),
                core_init="orthogonal",
                router=self.router,
                lora_dropout=self.dropout,
                modules_to_save=["lm_head"] if self.train_head else None,
            ),
            router=RouterSettings(**{name: ROUTER_LOSSES[name] for name in self.router_losses}),
            optimizer=OptimizerSettings(
                learning_rate=learning_rate,
                optim=self.optim,
                weight_decay=0.01,
                max_grad_norm=0.05,
                # above the gradients' rounding, 1e-8 here: AdamW would turn that noise into whole steps
                adam_epsilon=1e-6,
                lr_scheduler_type="cosine",
                warmup_steps=2,
                max_steps=self.steps,
                global_batch_size=self.global_batch,
            ),
            parallel=ParallelSettings(
                tensor_parallel_size=self.tensor_parallel, tp_plan=self.tp_plan and f"{models}/{self.tp_plan}"
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
    # DeepSpeed makes hpZ's groups once per process: 70b_multinode, which has them too, is a suite of its own
    *(Case(ds_config, 1, "sgd", "none") for ds_config in ("zero3_zeropp", "70b_8x80gb")),
    Case("zero3_offload", 1, "adamw_torch", "none"),
    Case("zero3_offload", 4, "sgd", "full"),
    *(Case("zero3", 1, "adamw_torch", "full", family) for family in ("qwen3", "mistral", "gemma3")),
    *(Case(ds_config, 1, "sgd", "none", router="input") for ds_config in ("zero2", "zero3")),
    Case("zero3", 1, "sgd", "none", train_head=True),
]

# Bfloat16 cannot equal fp32; it has a test of its own.
BF16_CASES = [Case(ds_config, 1, "adamw_torch", "none", bf16=True) for ds_config in ("zero2", "zero3")]

RESUME_CASES = [
    # the load balance loss needs the load of the step before the checkpoint
    Case("zero2", 2, "sgd", "none", dropout=0.1, router_losses=tuple(ROUTER_LOSSES)),
    *(
        Case(ds_config, 2, "adamw_torch", "none", dropout=0.1)
        for ds_config in ("zero1", "zero2", "zero3", "zero3_offload")
    ),
]

# r is no multiple of the tensor-parallel size
_TENSOR_PARALLEL = {"r": 5, "steps": 10, "global_batch": 12}


def _tensor_parallel(tensor_parallel: int, family: str) -> list[Case]:
    """Every ZeRO stage with accumulation 1 and 3, both optimizers, checkpointing off and on."""
    return [
        Case(
            f"zero{stage}",
            accumulation,
            optim,
            checkpointing,
            family,
            tensor_parallel=tensor_parallel,
            **_TENSOR_PARALLEL,
        )
        for stage in (0, 1, 2, 3)
        for accumulation, optim, checkpointing in ((1, "adamw_torch", "none"), (3, "sgd", "full"))
    ]


def variation(**changes: Any) -> Case:
    usual = {"ds_config": "zero3", "accumulation": 1, "optim": "sgd", "checkpointing": "none", "tensor_parallel": 2}
    return Case(**(usual | _TENSOR_PARALLEL | changes))


# llama has as many key-value heads as TP2 ranks, llama_gqa4 as TP4 ranks
TP2_CASES = [
    *_tensor_parallel(2, "llama"),
    # beside a column-parallel base dropout acts on a replicated tensor: every rank draws one process's mask
    *(
        variation(ds_config=f"zero{stage}", targets="q_proj k_proj v_proj gate_proj up_proj", dropout=0.3)
        for stage in (0, 3)
    ),
]
# beside a row-parallel one the masks are the ranks' own: recomputation must find them again
DROPOUT_CASES = [variation(checkpointing=checkpointing, dropout=0.3) for checkpointing in ("none", "full")]
TP2_DP2_CASES = [
    *_tensor_parallel(2, "llama"),
    variation(family="qwen3", accumulation=3),
    variation(ds_config="zero3_tp2", family="llama_tied"),
    variation(ds_config="zero3_offload", accumulation=3),
]
TP2_DP2_VARIATIONS = [
    *(variation(ds_config=f"zero{stage}", checkpointing="full") for stage in (0, 1, 2, 3)),
    *(variation(ds_config=f"zero{stage}", accumulation=3, optim="adamw_torch") for stage in (0, 1, 2, 3)),
    *(variation(ds_config=f"zero{stage}", family="qwen3", accumulation=3) for stage in (0, 1, 2)),
    *(variation(ds_config=f"zero{stage}", family="llama_tied") for stage in (0, 2)),
    *(variation(ds_config=f"zero{stage}", family="llama_bias") for stage in (0, 3)),
    *(variation(family=family) for family in ("mistral", "gemma3", "qwen2", "llama_odd_vocabulary")),
    *(variation(ds_config=f"zero{stage}", router="input") for stage in (2, 3)),
    variation(targets="q_proj v_proj down_proj"),
    # a plan that leaves the MLP whole: its weights are replicated, and partitioned over all four ranks
    *(variation(ds_config=f"zero{stage}", tp_plan="attention_only.json") for stage in (0, 2, 3)),
]
TP_BF16_CASES = [variation(ds_config=f"zero{stage}", optim="adamw_torch", bf16=True) for stage in (1, 2, 3)]
TP4_CASES = [*_tensor_parallel(4, "llama_gqa4"), variation(family="qwen3_gqa4", tensor_parallel=4)]
TP8_CASES = [variation(ds_config="zero3_tp8", tensor_parallel=8, family="llama_gqa8", steps=4)]
MULTINODE_CASES = [Case("70b_multinode", 1, "sgd", "none")]
TP_RESUME_CASES = [
    variation(ds_config="zero3", router_losses=tuple(ROUTER_LOSSES)),
    *(variation(ds_config=f"zero{stage}", optim="adamw_torch", dropout=0.1) for stage in (0, 1, 2, 3)),
]


def _activations(zero: int, tensor_parallel: int, *modes: tuple[str, str, bool], dropout: float = 0.0) -> list[Case]:
    """One case per mode: checkpointing, offload, partitioned."""
    return [
        variation(
            ds_config=f"zero{zero}",
            tensor_parallel=tensor_parallel,
            checkpointing=checkpointing,
            offload=offload,
            partition=partition,
            dropout=dropout,
        )
        for checkpointing, offload, partition in modes
    ]


# what layers keep, and where: checkpointing, offload, partitioned
KEPT_ALL = ("none", "none", False)
ON_HOST = [("none", "cpu", False), ("full", "cpu", False), ("selective:2", "cpu", False)]
SELECTIVE = ("selective:2", "none", False)
PARTITIONED = [("full", "none", True), ("full", "cpu", True)]
ACTIVATION_CASES = [
    *_activations(2, 1, ON_HOST[0]),
    *_activations(3, 1, ON_HOST[0], ON_HOST[2]),
    *_activations(0, 2, PARTITIONED[1]),
    *_activations(3, 2, ON_HOST[2], PARTITIONED[0]),
]
ACTIVATION_DROPOUT_CASES = _activations(3, 2, KEPT_ALL, PARTITIONED[0], dropout=0.3)
ACTIVATION_VARIATIONS = [
    *_activations(2, 1, SELECTIVE, *ON_HOST[1:]),
    *_activations(3, 1, SELECTIVE, ON_HOST[1]),
    *_activations(0, 2, SELECTIVE, *ON_HOST, PARTITIONED[0]),
    *_activations(3, 2, SELECTIVE, *ON_HOST[:2], PARTITIONED[1]),
    variation(family="gemma3", checkpointing="full", partition=True, accumulation=3),
    variation(family="llama_odd_vocabulary", checkpointing="full", partition=True),
]
ACTIVATION_DROPOUT_VARIATIONS = [
    *_activations(2, 1, KEPT_ALL, SELECTIVE, *ON_HOST, dropout=0.3),
    *_activations(3, 1, KEPT_ALL, SELECTIVE, *ON_HOST, dropout=0.3),
    *_activations(0, 2, KEPT_ALL, SELECTIVE, *ON_HOST, *PARTITIONED, dropout=0.3),
    *_activations(3, 2, KEPT_ALL, SELECTIVE, *ON_HOST, PARTITIONED[1], dropout=0.3),
]

# two micro-batches of two records per rank, all but one without a label
BESIDE_NOTHING = [
    variation(ds_config="zero3", tensor_parallel=1, accumulation=2, global_batch=8),
    variation(ds_config="zero0", tensor_parallel=2, accumulation=2, global_batch=4),
]

# few and small, for the interpreter of the kernels; tensor parallelism last: DeepSpeed keeps the mpu of earlier engines
_INTERPRETED = {"steps": 3, "global_batch": 4, "checkpointing": "full"}
KERNEL_CASES = [
    Case("zero3", 1, "adamw_torch", **_INTERPRETED),
    Case("zero2", 2, "sgd", router="input", **_INTERPRETED | {"checkpointing": "none"}),
    variation(router="input", **_INTERPRETED),
]


def _router_cases(tensor_parallel: int, accumulations: tuple[int, ...] = (1, 3)) -> list[Case]:
    """Statistics and losses of the routers: paddings x recomputation x accumulation, every ZeRO stage, every mode."""
    usual = {"tensor_parallel": tensor_parallel, "steps": 4, "router_losses": tuple(ROUTER_LOSSES)}
    cases = [
        variation(accumulation=accumulation, checkpointing=checkpointing, batches=batches, **usual)
        for batches in ("right", "left", "packed")
        for checkpointing in ("none", "full")
        for accumulation in accumulations
    ]
    cases += [variation(ds_config=f"zero{stage}", accumulation=3, batches="packed", **usual) for stage in (0, 1, 2)]
    cases += [variation(router="input", accumulation=3, **usual)]
    # not the load balance loss: it takes most of the clipped norm, and AdamW turns the rest's rounding into steps
    others = tuple(name for name in ROUTER_LOSSES if name != "router_aux_loss_coef")
    cases += [variation(optim="adamw_torch", **usual | {"router_losses": others, "steps": 10})]
    if tensor_parallel > 1:
        cases += [
            variation(checkpointing="full", partition=True, offload=offload, **usual) for offload in ("none", "cpu")
        ]
    return cases


SUITES = {
    "kernels": KERNEL_CASES,
    "router": _router_cases(1) + _router_cases(2),
    "router-tp2dp2": _router_cases(2, accumulations=(3,)),
    "zero": CASES + BF16_CASES,
    "tp2": TP2_CASES + DROPOUT_CASES,
    "tp4": TP4_CASES,
    "tp8": TP8_CASES,
    "70b_multinode": MULTINODE_CASES,
    "tp2dp2": TP2_DP2_CASES + TP_BF16_CASES,
    "tp2dp2-variations": TP2_DP2_VARIATIONS,
    "activations": ACTIVATION_CASES + ACTIVATION_DROPOUT_CASES,
    "activations-variations": ACTIVATION_VARIATIONS + ACTIVATION_DROPOUT_VARIATIONS,
}
