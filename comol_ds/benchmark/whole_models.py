"""The contenders of whole training steps: the same random Llama, assembled as launch/train.py does, adapted or not.

    comol      this package's adapter
    lora       PEFT's LoRA, same rank and targets
    molora     E LoRAs and a router on x beside every target (`contenders.MixtureOfLoras`)
    hydralora  as molora with one A for all experts
    frozen     no adapter; the first norm's weight trains, so that backward runs through all layers: the floor

DeepSpeed, optimizer and loss are the same for all. Router statistics are off; what they cost is another suite.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from peft import LNTuningConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from transformers import LlamaConfig, PreTrainedModel

from comol_ds.adapters.targets import default_targets
from comol_ds.benchmark.contenders import MixtureOfLorasLinear
from comol_ds.benchmark.processes import REPOSITORY
from comol_ds.config import (
    AdapterSettings,
    ModelSettings,
    OptimizerSettings,
    ParallelSettings,
    RouterSettings,
    RunConfig,
    RunSettings,
)
from comol_ds.data.collate import padded_batch
from comol_ds.ds_config import load_ds_json, resolve_ds_config
from comol_ds.layout import plan_batches
from comol_ds.parallel import groups
from comol_ds.parallel.assemble import Assembled, Attach, assemble, attach_adapter
from comol_ds.parallel.device import device
from comol_ds.training.router_load import RouterLoad
from comol_ds.training.step import train_step

VOCABULARY = 8192
ROWS = 4


@dataclass(frozen=True)
class ModelCase:
    """A random Llama, and a batch of 4 rows of ``tokens`` / 4 on every data-parallel rank.

    The embedding is small (8192 entries): it is the same for all contenders and would fill the memory.
    """

    hidden: int = 1024
    intermediate: int = 3072
    heads: int = 8
    key_value_heads: int = 8
    layers: int = 4
    tokens: int = 512
    r: int = 16
    num_experts: int = 8
    bf16: bool = False


def attach_lora(model: PreTrainedModel, settings: AdapterSettings, seed: int) -> PeftModel:
    """PEFT's LoRA on meta, beside what CoMoL would adapt."""
    targets = settings.target_modules or default_targets(model)
    config = LoraConfig(task_type="CAUSAL_LM", r=settings.r, lora_alpha=settings.lora_alpha, target_modules=targets)
    return get_peft_model(model, config, low_cpu_mem_usage=True)


def attach_mixture(
    model: PreTrainedModel, settings: AdapterSettings, seed: int, shared_down: bool = False
) -> PeftModel:
    """MoLoRA, or with one A for all experts HydraLoRA, in the places of LoRA."""
    adapted = attach_lora(model, settings, seed)
    base, sizes = adapted.get_base_model(), (settings.r, settings.num_experts, shared_down)
    for name, layer in list(base.named_modules()):
        if isinstance(layer, LoraLinear):
            base.set_submodule(name, MixtureOfLorasLinear(layer.base_layer, *sizes))
    return adapted


def attach_nothing(model: PreTrainedModel, settings: AdapterSettings, seed: int) -> PeftModel:
    """The first norm alone trains."""
    config = LNTuningConfig(task_type="CAUSAL_LM", target_modules=r".*\.layers\.0\.input_layernorm")
    return get_peft_model(model, config, low_cpu_mem_usage=True)


ATTACH: dict[str, Attach] = {
    "comol": attach_adapter,
    "lora": attach_lora,
    "molora": attach_mixture,
    "hydralora": partial(attach_mixture, shared_down=True),
    "frozen": attach_nothing,
}


class Trained:
    """One contender's engine on the arranged mesh, and the batch that every step trains on."""

    def __init__(self, case: ModelCase, name: str, folder: Path, keep_gathered: bool = True) -> None:
        """A collective call.

        Args:
            case: the model.
            name: the contender.
            folder: takes the model's configuration.
            keep_gathered: whether ZeRO-3 may keep weights between forward and backward, as it does with small models.
        """
        grid = groups.mesh().grid
        config, ds_config = _settings(case, folder / "config.json", grid.tensor_parallel, grid.data_parallel)
        if not keep_gathered:
            names = ("stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size")
            ds_config["zero_optimization"] |= dict.fromkeys(names, 0)
        model_path = config.model.model_name_or_path
        self.assembled: Assembled = assemble(config, model_path, ds_config, 1000, case.bf16, ATTACH[name])
        self.assembled.hf_ds_config = None  # while it lives, transformers would build the next contender in its own way
        self.assembled.engine.train()
        self._batch = _batch(case, grid.dp_rank)
        self._load = RouterLoad(self.assembled.engine.module, RouterSettings(router_load=False))

    def step(self) -> None:
        """Forward, backward, update. A collective call."""
        train_step(self.assembled, [self._batch], self._load, device(), 1)


def model_config(case: ModelCase) -> LlamaConfig:
    """The case's model."""
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=case.hidden, intermediate_size=case.intermediate,
        num_attention_heads=case.heads, num_key_value_heads=case.key_value_heads, num_hidden_layers=case.layers,
    )  # fmt: skip


def write_model(case: ModelCase, folder: Path) -> None:
    """The configuration that `Trained` reads."""
    model_config(case).save_pretrained(folder)


def _settings(case: ModelCase, model: Path, tensor_parallel: int, data_parallel: int) -> tuple[RunConfig, dict]:
    config = RunConfig(
        model=ModelSettings(model_name_or_path=str(model), init_random=True),
        adapter=AdapterSettings(r=case.r, num_experts=case.num_experts),
        optimizer=OptimizerSettings(per_device_train_batch_size=ROWS),
        parallel=ParallelSettings(tensor_parallel_size=tensor_parallel),
        run=RunSettings(ds_config=str(REPOSITORY / "ds_configs" / "zero3.json")),
    )
    batches = plan_batches(data_parallel, ROWS, ROWS * data_parallel)
    return config, resolve_ds_config(load_ds_json(config.run.ds_config), config, batches, case.bf16)


def _batch(case: ModelCase, seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, VOCABULARY, (ROWS, case.tokens // ROWS), generator=generator).tolist()
    records = [{"input_ids": ids, "labels": ids, "record_id": row, "task": None} for row, ids in enumerate(rows)]
    return padded_batch(records, pad_token_id=0)
