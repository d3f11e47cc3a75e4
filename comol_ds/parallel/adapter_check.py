"""Refuses adapters that would do nothing: beside a Linear that the model's code does not call.

A parent may read a Linear's weight and multiply by itself, in a fused kernel of a GPU too; or no token passes through
the module. An adapter there is trained and saved, and changes nothing.
"""

import dis
import inspect
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import takewhile
from types import FunctionType

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from comol_ds.adapters.comol_layer import ADAPTER, CoMoLLinear, comol_layers
from comol_ds.adapters.text_model import beside_text
from comol_ds.config import AdapterSettings
from comol_ds.errors import UserError, one_line
from comol_ds.parallel.assemble import attach_adapter
from comol_ds.parallel.shrunken import VOCABULARY, NotShrinkable, shrunken_copy, without_numbers

_TOKENS = 16
_AT_MOST = 3  # names in a message
_NOT_TRIED = "note: whether the model uses every adapter could not be tried on a small copy of it: "


def check_adapters_work(adapted: PeftModel, settings: AdapterSettings, attn_implementation: str) -> str | None:
    """Refuse adapters that no gradient would reach, and those that a fused kernel would pass by.

    Tried on a small copy of the model with a few tokens. Of experts only some get one, so an expert's adapter counts as
    working if the same one beside another expert of the layer does.

    Args:
        adapted: the model with its adapter; only names and the configuration are read.
        settings: the adapter's.
        attn_implementation: the run's.

    Returns:
        What is to be said where no small copy runs, and nothing is known or refused.

    Raises:
        UserError: naming the modules, why, and the targets that work.
    """
    base = adapted.get_base_model()
    try:
        small = shrunken_copy(base.config, attn_implementation)
    except NotShrinkable as error:
        return f"{_NOT_TRIED}{error}"
    targets = _targets(small, set(comol_layers(base)))
    beside = beside_text(small)
    reasons = {name: f"no token passes through {name}" for name in targets if name in beside}
    tiny = replace(settings, r=2, num_experts=2, lora_dropout=0.0, target_modules=targets, modules_to_save=None)
    trial = attach_adapter(small, tiny, seed=0).train()  # fused kernels serve training only
    layers = comol_layers(trial)
    for layer in layers.values():
        layer.__class__ = _Watched
    logits = _logits(trial, layers)
    if isinstance(logits, Exception):
        return _NOT_TRIED + one_line(logits, limit=200)
    silent = _without_gradient(layers, logits)
    for name, layer in layers.items():
        parent = type(small.get_submodule(name.rpartition(".")[0]))
        if layer.weight_was_read and name.rpartition(".")[2] in _read_weights(parent):
            reasons.setdefault(name, f"{parent.__name__} reads the weight of {name} instead of calling it")
        elif name in silent:
            reasons.setdefault(name, f"{parent.__name__} does not call {name}, or without gradients")
    if reasons:
        raise UserError(_refusal(reasons, targets))
    return None


class _Watched(CoMoLLinear):
    """An adapted layer that notices when somebody else reads its base's weight."""

    weight_was_read = False

    @property
    def weight(self) -> nn.Parameter:
        self.weight_was_read = True
        return self.base_layer.weight


def _targets(small: PreTrainedModel, adapted: set[str]) -> list[str]:
    """The Linears of the copy that are adapted in the model; where only layers are that the copy lacks, all alike."""
    linears = [name for name, module in small.named_modules() if isinstance(module, nn.Linear)]
    present = {without_numbers(name) for name in adapted.intersection(linears)}
    elsewhere = {without_numbers(name) for name in adapted} - present
    return [name for name in linears if name in adapted or without_numbers(name) in elsewhere]


def _logits(trial: PeftModel, layers: dict[str, CoMoLLinear]) -> torch.Tensor | Exception:
    """Logits of a few tokens, or why the model does not run in training mode even without adapters.

    Raises:
        UserError: it runs without them only.
    """
    entered: list[str] = []
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda layer, args, name=name: entered.append(name))
    ids = torch.randint(3, VOCABULARY, (1, _TOKENS), generator=torch.Generator().manual_seed(0))
    try:
        return trial(input_ids=ids, use_cache=False).logits
    except Exception as error:
        where = entered[-1:]
        try:
            with trial.disable_adapter(), torch.no_grad():
                trial(input_ids=ids, use_cache=False)
        except Exception as without:
            return without
        reason = f"--target_modules: the model does not run with an adapter beside {' '.join(where)}"
        raise UserError(f"{reason}; name other modules: {one_line(error, limit=200)}") from error


def _without_gradient(layers: dict[str, CoMoLLinear], logits: torch.Tensor) -> set[str]:
    """The layers whose adapter gets no gradient; experts of which another one works are none of them."""
    if not logits.requires_grad:
        return set(layers)
    last = [layer.comol_B[ADAPTER] for layer in layers.values()]
    gradients = torch.autograd.grad(logits.sum(), last, allow_unused=True)
    reached = {name: gradient is not None for name, gradient in zip(layers, gradients, strict=True)}
    working = {_in_layer(name) for name, works in reached.items() if works}
    return {name for name in reached if _in_layer(name) not in working}


def _in_layer(name: str) -> str:
    """The name with every number but the first, the decoder layer's, replaced: equal for the experts of a layer."""
    parts = name.split(".")
    first = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join([*parts[: first + 1], without_numbers(".".join(parts[first + 1 :]))])


@cache
def _read_weights(parent: type[nn.Module]) -> set[str]:
    """Names of the children whose whole weight some method of a class reads: ``self.out_proj.weight`` as a value.

    A kernel that exists on a GPU only may get it in training, so that no gradient tells. Found in the compiled methods;
    initialization, which reads too, is left out.
    """
    names = set()
    for cls in takewhile(lambda cls: cls is not nn.Module, inspect.getmro(parent)):
        for name, method in vars(cls).items():
            if inspect.isfunction(method) and "init" not in name and "reset" not in name:
                names.update(_weights_read_in(inspect.unwrap(method)))
    return names


def _weights_read_in(method: FunctionType) -> Iterator[str]:
    steps = list(dis.get_instructions(method))
    for owner, child, weight, after in zip(steps, steps[1:], steps[2:], steps[3:], strict=False):
        # Python 3.13 loads two variables at once
        of_self = owner.argval == "self" or (isinstance(owner.argval, tuple) and owner.argval[-1:] == ("self",))
        reads = child.opname == weight.opname == "LOAD_ATTR" and weight.argval == "weight"
        # self.proj.weight.dtype says nothing about its use
        if of_self and reads and after.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
            yield child.argval


def _refusal(reasons: dict[str, str], targets: list[str]) -> str:
    """One line: where adapters would do nothing and why, and what to name instead."""
    kinds = {without_numbers(name): reason for name, reason in reversed(reasons.items())}
    told = list(reversed(kinds.values()))
    more = f", and {len(told) - _AT_MOST} more" if len(told) > _AT_MOST else ""
    bad = {name.rpartition(".")[2] for name in reasons}
    good = sorted({name.rpartition(".")[2] for name in targets} - bad)
    remedy = f"use --target_modules {' '.join(good)}" if good else "name other modules with --target_modules"
    return f"--target_modules: adapters would do nothing, for {', '.join(told[:_AT_MOST])}{more}; {remedy}"
