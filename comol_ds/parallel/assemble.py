"""One function, one stated order for every layout: build the base on meta -> attach adapters -> tensor parallelism ->
load -> checkpointing and leaf modules -> engine.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from accelerate import init_empty_weights
from peft import PeftModel, get_peft_model
from transformers import PretrainedConfig, PreTrainedModel, get_scheduler
from transformers.initialization import no_init_weights
from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

from comol_ds.adapters.config import CoMoLConfig
from comol_ds.adapters.shared_down import share_down_projections
from comol_ds.adapters.table import BaseKind
from comol_ds.adapters.targets import default_targets
from comol_ds.base_config import build_base, read_base_config, read_generation_config
from comol_ds.config import AdapterSettings, ModelSettings, OptimizerSettings, RunConfig
from comol_ds.ds_config import zero_stage
from comol_ds.errors import UserError
from comol_ds.parallel import groups
from comol_ds.parallel.activations import leaf_layer_types, prepare_activations
from comol_ds.parallel.gradients import Gradients
from comol_ds.parallel.loading import load_weights
from comol_ds.parallel.mesh import Mesh
from comol_ds.parallel.random_weights import draw_weights
from comol_ds.parallel.router_losses import RouterLosses
from comol_ds.parallel.staging import open_weights
from comol_ds.parallel.start_adapter import load_start_adapter
from comol_ds.parallel.tensor_parallel import draw_adapters, parallelize
from comol_ds.parallel.tp_plan import place_linears
from comol_ds.parallel.vocabulary import Vocabulary
from comol_ds.parallel.weight_files import WeightFiles
from comol_ds.parallel.weight_names import find_weights
from comol_ds.tensor_files import StoredTensor


@dataclass
class Assembled:
    """The engine, what a step needs beside it, and one object that must outlive it.

    transformers finds the DeepSpeed configuration through a weak reference; when ``hf_ds_config`` is collected,
    generate() and from_pretrained() no longer know that ZeRO-3 is on.
    """

    engine: deepspeed.DeepSpeedEngine
    vocabulary: Vocabulary
    gradients: Gradients
    router_losses: RouterLosses
    hf_ds_config: HfDeepSpeedConfig | None


# attaches something trainable to a base that stands on meta; see `attach_adapter`
Attach = Callable[[PreTrainedModel, AdapterSettings, int], PeftModel]


def assemble(
    config: RunConfig,
    model_path: str,
    ds_config: dict[str, Any],
    total_steps: int,
    bf16: bool,
    attach: Attach | None = None,
) -> Assembled:
    """Build everything that a training step needs, on the mesh that is arranged.

    Args:
        config: the run's settings.
        model_path: folder or hub name of the base model.
        ds_config: the resolved DeepSpeed dictionary.
        total_steps: optimizer steps of the whole run, for the schedule.
        bf16: store the base and compute in bfloat16, with fp32 master copies of what trains.
        attach: what takes the place of `attach_adapter`, for comparisons.

    Raises:
        UserError: the model cannot be loaded, or the target modules match nothing.
    """
    stage, mesh = zero_stage(ds_config), groups.mesh()
    model, vocabulary = build_model(config, model_path, ds_config, bf16, mesh, attach)
    # not earlier: while it lives, transformers partitions what it builds, and draws and broadcasts values
    hf_ds_config = HfDeepSpeedConfig(ds_config) if stage == 3 else None
    if config.adapter.adapter_name_or_path is not None:
        load_start_adapter(model, config.adapter.adapter_name_or_path)
    prepare_activations(model, config.model, mesh, leaf_layers=stage == 3)
    optimizer = build_optimizer(model, config.optimizer)
    schedule = build_schedule(optimizer, config.optimizer, total_steps)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[p for p in model.parameters() if p.requires_grad],
        optimizer=optimizer,
        lr_scheduler=schedule,
        config=ds_config,
        mpu=mesh if mesh.grid.tensor_parallel > 1 else None,
    )
    # from here on ranks with other records draw other dropout masks, tensor-parallel peers the same
    torch.manual_seed(config.run.seed + mesh.grid.dp_rank)
    router_losses = RouterLosses(model, config.router, mesh)
    return Assembled(engine, vocabulary, Gradients(engine, mesh), router_losses, hf_ds_config)


def build_model(
    config: RunConfig,
    model_path: str,
    ds_config: dict[str, Any],
    bf16: bool,
    mesh: Mesh,
    attach: Attach | None = None,
) -> tuple[PeftModel, Vocabulary]:
    """This rank's part of base and adapter: built on meta, adapted, sharded, then read from the files into place.

    With bf16 the adapter's working copy is bfloat16 like the base's: ZeRO keeps the fp32 master weights, gathers base
    and adapter in one buffer, and that buffer has one dtype.

    Raises:
        UserError: no such model, weights that do not belong to it or cannot be read, or target modules that match
            nothing; on every rank.
    """
    base = build_skeleton(config.model, model_path, bf16)
    stored = None if config.model.init_random else locate_weights(base, model_path)
    placement = place_linears(base, config.parallel.tp_plan) if mesh.grid.tensor_parallel > 1 else None
    model = (attach or attach_adapter)(base, config.adapter, config.run.seed)
    torch.manual_seed(config.run.seed)
    vocabulary = give_ranks_their_part(model, placement, mesh, torch.device("cpu"), bf16)
    if stored is None:
        draw_weights(model, base, ds_config, mesh, config.run.seed)
    else:
        load_weights(model, stored, ds_config, mesh)
    return model, vocabulary


def give_ranks_their_part(
    model: PeftModel, placement: dict[str, BaseKind] | None, mesh: Mesh, device: torch.device, bf16: bool
) -> Vocabulary:
    """Shard a model that stands on meta, if it is placed, and draw this rank's part of the adapter.

    Adapters of a decoder layer that read the same tensor do so in one product, see `share_down_projections`.

    Args:
        model: adapted; changed in place.
        placement: see `place_linears`; None where nothing is sharded.
        mesh: the ranks.
        device: where the adapter's parameters go.
        bf16: cast them.

    Returns:
        How the logits are spread; it watches the head.
    """
    if placement is None:
        draw_adapters(model, mesh, device)
        vocabulary = Vocabulary()
    else:
        vocabulary = parallelize(model, placement, mesh, device)
    if bf16:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
    base = model.get_base_model()
    vocabulary.watch_head(base.get_output_embeddings())
    # only inside what ZeRO-3 gathers at once: a sibling reads the parameters of the others
    whole_layers = tuple(leaf_layer_types(base))
    for layer in base.modules():
        if isinstance(layer, whole_layers):
            share_down_projections(layer)
    return vocabulary


def build_skeleton(settings: ModelSettings, model_path: str, bf16: bool) -> PreTrainedModel:
    """The base model without memory for its parameters; buffers, which the configuration determines, are real.

    Raises:
        UserError: no such model, or a quantized one.
    """
    assert not is_deepspeed_zero3_enabled(), "transformers would build it under its own zero.Init"
    where = f"--model_name_or_path {model_path}"
    model_config = read_training_config(model_path, settings.trust_remote_code)
    with no_init_weights(), init_empty_weights(include_buffers=False):
        model = build_base(
            model_config,
            settings.trust_remote_code,
            where,
            settings.attn_implementation,
            dtype=torch.bfloat16 if bf16 else torch.float32,
        )
    model.tie_weights()  # init_empty_weights gave each place a parameter of its own
    generation_config = read_generation_config(model_path, where)
    if generation_config is not None:
        model.generation_config = generation_config
    return model.eval()


def read_training_config(model_path: str, trust_remote_code: bool) -> PretrainedConfig:
    """The configuration of a base that can be trained.

    Raises:
        UserError: see `read_base_config`; or the model is quantized.
    """
    config = read_base_config(model_path, trust_remote_code, f"--model_name_or_path {model_path}")
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"--model_name_or_path {model_path} is quantized (quantization_config in its config.json); use the model's"
            " float32, bfloat16 or float16 weights"
        )
    return config


def locate_weights(base: PreTrainedModel, model_path: str) -> dict[str, StoredTensor]:
    """Where the files hold each parameter of the whole base; one process per node downloads what is missing.

    Raises:
        UserError: see `open_weights` and `find_weights`; on every rank.
    """
    world = groups.read_world()
    groups.first_on_each_node(
        world, "download the weights", lambda: WeightFiles(model_path) if world.local_rank == 0 else None
    )
    return groups.together("find the weights", lambda: find_weights(base, open_weights(model_path)))


def attach_adapter(model: PreTrainedModel, settings: AdapterSettings, seed: int) -> PeftModel:
    """Freeze the base and wrap the target modules; the base's weights are not read.

    On a real model the adapter is drawn from ``seed``; on meta it is only declared. What is left out beside the text
    model is no warning of every rank: the run's notes name it.

    Raises:
        UserError: a name of the target modules, or of the modules to save, matches nothing in the model.
    """
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\d+ modules beside the text model")
        return get_peft_model(model, comol_config(settings, settings.target_modules or default_targets(model)))


def comol_config(settings: AdapterSettings, targets: list[str] | str) -> CoMoLConfig:
    """The PEFT configuration of the run's adapter settings, for these target modules."""
    # one word that is no plain name is "all-linear" or a regular expression, which PEFT takes as a string
    if len(targets) == 1 and not targets[0].replace(".", "").isidentifier():
        targets = targets[0]
    return CoMoLConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        num_experts=settings.num_experts,
        router=settings.router,
        core_init=settings.core_init,
        dropout_scheme=settings.dropout_scheme,
        target_modules=targets,
        modules_to_save=settings.modules_to_save,
    )


def build_optimizer(model: PeftModel, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """torch's AdamW or SGD over the trainable parameters."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if settings.optim == "sgd":
        return torch.optim.SGD(
            trainable, settings.learning_rate, momentum=settings.sgd_momentum, weight_decay=settings.weight_decay
        )
    return torch.optim.AdamW(
        trainable,
        settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
    )


def build_schedule(optimizer: torch.optim.Optimizer, settings: OptimizerSettings, total_steps: int) -> Any:
    """A schedule of transformers.get_scheduler over ``total_steps`` optimizer steps.

    Raises:
        UserError: unknown name, or one that needs further arguments.
    """
    try:
        return get_scheduler(settings.lr_scheduler_type, optimizer, settings.warmup_steps, total_steps)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"--lr_scheduler_type {settings.lr_scheduler_type}: {error}; try linear or cosine") from error


def total_steps(settings: OptimizerSettings, steps_per_epoch: int | None) -> int:
    """Optimizer steps of the run: --max_steps, or --num_train_epochs passes."""
    if settings.max_steps > 0:
        return settings.max_steps
    assert steps_per_epoch is not None, "a stream without --max_steps is refused by the configuration"
    return math.ceil(settings.num_train_epochs * steps_per_epoch)
