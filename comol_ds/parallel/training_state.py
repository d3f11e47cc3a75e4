"""The canonical state of what trains: whole fp32 tensors, the same whatever layout holds them.

A parameter's values and each of the optimizer's moments have the parameter's whole shape; the optimizer's step count
is a number per parameter. What ZeRO has flattened, padded and partitioned and tensor parallelism has sliced is put
together here one parameter at a time, and taken apart again on another layout; the frozen base is never touched.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from comol_ds.errors import UserError
from comol_ds.parallel.groups import mesh
from comol_ds.parallel.zero_partition import full_fp32, over_tensor_parallel

VALUES, STEP = "fp32", "step"  # beside the optimizer's moments, which have torch's names

# kind ("fp32", "exp_avg", "step", ...) -> parameter's name in the model -> tensor
TrainingState = dict[str, dict[str, torch.Tensor]]


def gather_training_state(engine: DeepSpeedEngine) -> TrainingState:
    """Values, moments and step counts of every trainable parameter, in host memory of rank 0; empty on other ranks.

    A collective call, for one parameter and kind at a time.
    """
    state: TrainingState = {}
    _link_optimizer_state(engine)
    stage, kept = engine.zero_optimization_stage(), _state_of_parameters(engine)
    for name, parameter in _trainable(engine):
        moments = kept[id(parameter)]
        whole = {VALUES: over_tensor_parallel(parameter, full_fp32(parameter, stage))}
        for kind in _moments(moments):
            local = moments[kind] if stage == 0 else safe_get_full_optimizer_state(parameter, kind)
            whole[kind] = over_tensor_parallel(parameter, local.reshape(_shape(parameter)))
        if STEP in moments:
            whole[STEP] = torch.as_tensor(moments[STEP], dtype=torch.float32)
        if dist.get_rank() == 0:
            for kind, tensor in whole.items():
                state.setdefault(kind, {})[name] = tensor.to("cpu", torch.float32, copy=True).contiguous()
    return state


def restore_training_state(
    engine: DeepSpeedEngine, kinds: Mapping[str, list[str]], read: Callable[[str, str], torch.Tensor]
) -> None:
    """Overwrite values, moments and step counts of an engine that has not stepped yet, on any layout. Collective.

    Args:
        engine: of a model with the same trainable parameters and the same optimizer.
        kinds: kind -> names of the parameters that have it, as `stored_kinds` returns them.
        read: (kind, parameter's name) -> the whole tensor; asked for one at a time.
    """
    parameters = dict(_trainable(engine))
    stage, moments = engine.zero_optimization_stage(), [kind for kind in kinds if kind not in (VALUES, STEP)]
    if stage == 3:
        engine.optimizer.checkpoint_event_prologue()  # partitions what stays gathered between steps
    _create_optimizer_state(engine, moments)
    write = {0: _write_plain, 1: _write_flattened, 2: _write_flattened, 3: _write_partitioned}[stage]
    for name, parameter in parameters.items():
        for kind in (VALUES, *moments):
            shard = getattr(parameter, "shard", None)
            whole = read(kind, name).to(torch.float32)
            write(engine, parameter, kind, whole if shard is None else shard.part_of(whole))
    if STEP in kinds:
        _set_steps(engine, {name: float(read(STEP, name)) for name in kinds[STEP]})
    if stage == 3:
        engine.optimizer.checkpoint_event_epilogue()


def optimizer_hyperparameters(engine: DeepSpeedEngine) -> list[dict[str, Any]]:
    """Learning rate, betas, decay, ... of every parameter group: what a JSON file can hold of them."""
    plain = (bool, int, float, str, tuple, list, type(None))
    groups = engine.basic_optimizer.param_groups
    return [{k: v for k, v in group.items() if k != "params" and isinstance(v, plain)} for group in groups]


def continue_schedule(engine: DeepSpeedEngine, settings: list[dict[str, Any]], step: int) -> None:
    """Let the engine train with these settings of `optimizer_hyperparameters`, at the rate of its schedule after
    ``step`` steps, whatever a checkpoint has put in their place."""
    optimizer = engine.basic_optimizer
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)
    # a schedule that is made with a position computes the rate there from the groups' initial_lr
    engine.lr_scheduler = LambdaLR(optimizer, engine.lr_scheduler.lr_lambdas, last_epoch=step - 1)


def stored_kinds(
    engine: DeepSpeedEngine, shapes: Mapping[str, Mapping[str, tuple[int, ...]]], where: Path
) -> dict[str, list[str]]:
    """kind -> names of stored tensors, as `restore_training_state` takes them; kinds that the optimizer lacks are left.

    Args:
        engine: that is to continue with them.
        shapes: kind -> name -> shape of what is stored.
        where: the file, for messages.

    Raises:
        UserError: a kind is missing that the optimizer needs, a name or a shape is not the model's.
    """
    needed, parameters = _kinds_after_a_step(engine), dict(_trainable(engine))
    remedy = "resume with the base, adapter and optimizer that wrote it"
    if missing := sorted(needed - shapes.keys()):
        name = type(engine.basic_optimizer).__name__
        raise UserError(f"{where} has no {missing[0]} of the parameters, which {name} needs; {remedy}")
    for kind in sorted(needed):
        if differing := sorted(shapes[kind].keys() ^ parameters.keys()):
            first = f"{differing[0]!r:.200}"
            raise UserError(f"{where}: stored and trained parameters differ in {kind}, first {first}; {remedy}")
        for name, parameter in parameters.items():
            if not _fits(parameter, shapes[kind][name], kind):
                shape = list(shapes[kind][name])
                raise UserError(f"{where}: {kind} of {name} has shape {shape}, which is not this model's; {remedy}")
    return {kind: list(shapes[kind]) for kind in needed}


def _kinds_after_a_step(engine: DeepSpeedEngine) -> set[str]:
    """What the engine's optimizer keeps of a parameter, and the values: a step of one number shows it."""
    number = torch.zeros(1, requires_grad=True)
    number.grad = torch.zeros(1)
    optimizer = type(engine.basic_optimizer)([number], lr=0.0)
    optimizer.param_groups[0].update(optimizer_hyperparameters(engine)[0])
    optimizer.step()
    return {VALUES} | {kind for kind, value in optimizer.state[number].items() if isinstance(value, torch.Tensor)}


def _fits(parameter: nn.Parameter, stored: tuple[int, ...], kind: str) -> bool:
    """Whether a whole stored tensor has the shape of which this rank holds its part."""
    if kind == STEP:
        return stored == ()
    mine, shard = list(_shape(parameter)), getattr(parameter, "shard", None)
    if shard is not None and len(stored) == len(mine) and stored[shard.dim] >= shard.stop:
        mine[shard.dim] = stored[shard.dim]  # the last rank's part ends where the tensor does
        grid = mesh().grid
        return list(stored) == mine and (grid.tp_rank < grid.tensor_parallel - 1 or stored[shard.dim] == shard.stop)
    return list(stored) == mine


def _trainable(engine: DeepSpeedEngine) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in engine.module.named_parameters() if p.requires_grad)


def _shape(parameter: nn.Parameter) -> torch.Size:
    """This rank's shape before ZeRO-3 partitioned it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _moments(state: Mapping[str, Any]) -> list[str]:
    return sorted(kind for kind, value in state.items() if kind != STEP and isinstance(value, torch.Tensor))


def _stepped_tensors(engine: DeepSpeedEngine) -> list[tuple[torch.Tensor, list[nn.Parameter]]]:
    """Every tensor that the torch optimizer steps, with the parameters that lie in it, wholly or in part.

    ZeRO steps its flat fp32 partitions in place of the parameters; their names are DeepSpeed 0.19's.
    """
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        return [(p, [p]) for _, p in _trainable(engine)]
    if stage == 3:
        return list(zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True))
    return list(zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True))


def _state_of_parameters(engine: DeepSpeedEngine) -> dict[int, dict[str, Any]]:
    """id of a parameter -> the optimizer's state of the tensor that it lies in; empty before the first step."""
    state = engine.basic_optimizer.state
    return {id(p): state.get(tensor, {}) for tensor, inside in _stepped_tensors(engine) for p in inside}


def _create_optimizer_state(engine: DeepSpeedEngine, moments: list[str]) -> None:
    """What torch's optimizers create in their first step: moments of zeros."""
    state = engine.basic_optimizer.state
    for tensor, _ in _stepped_tensors(engine):
        state[tensor] = {kind: torch.zeros_like(tensor, requires_grad=False) for kind in moments}
    _link_optimizer_state(engine)


def _link_optimizer_state(engine: DeepSpeedEngine) -> None:
    """At stages 1 and 2, DeepSpeed finds a parameter's part of the moments through links, made in the first step."""
    state = engine.basic_optimizer.state
    if engine.zero_optimization_stage() in (1, 2):
        for tensor, inside in _stepped_tensors(engine):
            if tensor in state:
                lazy_init_hp_params_optimizer_state(inside, tensor, state)


def _set_steps(engine: DeepSpeedEngine, steps: dict[str, float]) -> None:
    """One count per stepped tensor. It is a tensor on the host, as torch's own first step makes it."""
    counts = {id(p): steps[name] for name, p in _trainable(engine)}
    for tensor, inside in _stepped_tensors(engine):
        (count,) = {counts[id(p)] for p in inside}
        engine.basic_optimizer.state[tensor][STEP] = torch.tensor(count, dtype=torch.float32)


def _write_plain(engine: DeepSpeedEngine, parameter: nn.Parameter, kind: str, value: torch.Tensor) -> None:
    target = parameter.data if kind == VALUES else engine.basic_optimizer.state[parameter][kind]
    target.copy_(value)


def _write_flattened(engine: DeepSpeedEngine, parameter: nn.Parameter, kind: str, value: torch.Tensor) -> None:
    """ZeRO 1 and 2: this rank's part of the fp32 copy or moment, and the working copy, which every rank has whole."""
    if kind == VALUES:
        safe_set_full_fp32_param(parameter, value)
        parameter.data.copy_(value)
    else:
        safe_set_full_optimizer_state(parameter, value, kind)


def _write_partitioned(engine: DeepSpeedEngine, parameter: nn.Parameter, kind: str, value: torch.Tensor) -> None:
    """ZeRO-3: this rank's part, padded at the end; ``ds_tensor`` is the partition of the working copy."""
    size = parameter.ds_tensor.numel()
    part = torch.zeros(size, dtype=value.dtype)
    mine = value.flatten()[dist.get_rank(parameter.ds_process_group) * size :][:size]
    part[: mine.numel()] = mine
    if kind == VALUES:
        safe_set_local_fp32_param(parameter, part)
        parameter.ds_tensor.data.copy_(part)
    else:
        safe_set_local_optimizer_state(parameter, part, kind)
