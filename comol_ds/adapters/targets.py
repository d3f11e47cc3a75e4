"""Which Linears of a model an adapter reaches: the default names, and whether every name that was given is there.

PEFT refuses target_modules only where nothing at all matches; a mistyped name among good ones would narrow the adapter
without a word.
"""

import difflib
import re
import warnings
from collections.abc import Collection, Iterable, Sequence
from itertools import chain
from types import SimpleNamespace

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from torch import nn
from torch.func import functional_call

from comol_ds.adapters.comol_layer import CoMoLLinear
from comol_ds.adapters.config import ALL_LINEAR, CoMoLConfig
from comol_ds.adapters.text_model import beside_text, text_model
from comol_ds.config import DEFAULT_TARGETS
from comol_ds.errors import UserError

_NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")


def default_targets(model: nn.Module) -> list[str]:
    """What is adapted where target_modules is not set: the DEFAULT_TARGETS that Linears of the text model end in.

    Raises:
        UserError: it has none of them.
    """
    endings = linear_suffixes(text_model(model))
    if found := [name for name in DEFAULT_TARGETS if name in endings]:
        return found
    raise UserError(
        f"target_modules is not set and the model has none of the default {', '.join(DEFAULT_TARGETS)};"
        f" its Linear modules end in: {', '.join(endings) or 'none'}"
    )


def missing_defaults(model: nn.Module) -> str | None:
    """What is to be said where target_modules is not set and only a part of the default list is there."""
    targets = default_targets(model)
    if len(targets) == len(DEFAULT_TARGETS):
        return None
    missing = [name for name in DEFAULT_TARGETS if name not in targets]
    return (
        f"target_modules is not set: {', '.join(targets)} are adapted, the model has no {', '.join(missing)};"
        f" its Linear modules end in: {', '.join(linear_suffixes(text_model(model)))}"
    )


def settle_targets(config: CoMoLConfig, model: nn.Module) -> list[str]:
    """Check what the user said of modules, and fill in the default of target_modules or what all-linear means.

    Args:
        config: changed in place. A saved one means what it says: its names are not checked, its tensors are when they
            are loaded, and nothing is left out of it.
        model: the base, with other adapters or without; no module is wrapped yet.

    Returns:
        Modules beside the text model that match, and that the configuration now leaves out.

    Raises:
        UserError: a name of target_modules, exclude_modules or modules_to_save, or a number of layers_to_transform,
            stands for no module, or the default names nothing in the model.
    """
    asked = config.target_modules
    if config.said_now:
        _check_names(config, model)
    if asked is None:
        if note := missing_defaults(model):
            warnings.warn(note, stacklevel=2)
        config.target_modules = set(default_targets(model))
    elif is_all_linear(asked):
        _maybe_include_all_linear_layers(config, model)
        config.target_modules -= _bent_linears(model)
    if not config.said_now:
        return []
    _check_reached(config, model, asked if isinstance(asked, set) else set())
    return _leave_out_beside_text(config, model, asked)


def _check_names(config: CoMoLConfig, model: nn.Module) -> None:
    modules = dict.fromkeys(_base_modules(model))
    for setting in ("target_modules", "exclude_modules", "modules_to_save"):
        names = config.said_modules_to_save if setting == "modules_to_save" else getattr(config, setting) or ()
        ends = str.endswith if setting == "modules_to_save" else _ends_in  # as PEFT matches them
        for name in () if isinstance(names, str) else sorted(names):
            if name not in modules and not any(ends(module, name) for module in modules):
                raise UserError(_no_match(setting, name, list(modules), model))


def _check_reached(config: CoMoLConfig, model: nn.Module, asked: set[str]) -> None:
    modules, beside = dict.fromkeys(_base_modules(model)), beside_text(model) - asked
    of_text = dict.fromkeys(module for module in modules if module not in beside)
    for name in sorted(asked - set(config.modules_to_save or ())):
        if not _reached(_first(name, modules), config, target_modules={name}):
            raise UserError(f"target_modules {name} is left with no module{narrowed_by(config)}")
        if not _reached(_first(name, of_text), config, target_modules={name}):
            raise UserError(
                f"target_modules {name} match no module of the text model; what lies beside it is adapted where its"
                " whole name, or a regular expression, says so"
            )
    layers = config.layers_to_transform
    for number in [layers] if isinstance(layers, int) else layers or []:
        if not _reached(modules, config, layers_to_transform=[number]):
            raise UserError(f"layers_to_transform {number}: the model has no layer of this number with target_modules")


def _leave_out_beside_text(config: CoMoLConfig, model: nn.Module, asked: set[str] | str | None) -> list[str]:
    """Exclude what no token passes through, unless its whole name or a regular expression asked for it."""
    if isinstance(asked, str) and not is_all_linear(asked):
        return []
    beside = beside_text(model) - (asked if isinstance(asked, set) else set())
    left = [name for name in _base_modules(model) if name in beside and check_target_module_exists(config, name)]
    if not left:
        return []
    if isinstance(asked, str):
        config.target_modules -= set(left)  # whole names
    elif isinstance(config.exclude_modules, str):
        config.exclude_modules = "|".join([config.exclude_modules, *map(re.escape, left)])
    else:
        config.exclude_modules = {*(config.exclude_modules or ()), *left}
    warnings.warn(
        f"{len(left)} modules beside the text model match target_modules and get no adapter, because no token passes"
        f" through them; the first is {left[0]}; whole names, or a regular expression, reach them",
        stacklevel=3,
    )
    return left


def _bent_linears(model: nn.Module) -> set[str]:
    """Names of the Linears that return something else than a Linear does; said in a warning."""
    found = {name: module for name, module in model.named_modules() if not adds_to(module)}
    if found:
        kinds = ", ".join(sorted({type(module).__name__ for module in found.values()}))
        warnings.warn(f"all-linear leaves out {len(found)} modules that do not return x W^T: {kinds}", stacklevel=3)
    return set(found)


def adds_to(module: nn.Module) -> bool:
    """Whether an update can be added to what the module returns: one tensor [..., O], as a Linear returns it.

    A subclass with a forward of its own is tried on meta, without its weights: the router of Llama 4 is a Linear that
    returns a tuple. One that does not run there, such as a Linear with packed weights, is believed.
    """
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return True
    shapes = {"weight": (module.out_features, module.in_features), "bias": (module.out_features,)}
    on_meta = {
        name: torch.empty(shapes[name], device="meta") for name, _ in module.named_parameters() if name in shapes
    }
    try:
        y = functional_call(module, on_meta, (torch.empty(2, module.in_features, device="meta"),))
    except Exception:
        return True
    return isinstance(y, torch.Tensor) and y.shape == (2, module.out_features)


def is_all_linear(target_modules: object) -> bool:
    """Whether PEFT reads it as all Linears but the output head."""
    return isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR


def linear_suffixes(model: nn.Module) -> list[str]:
    """Last name parts of the model's Linears, sorted: what target_modules can name."""
    linears = (name for name, module in model.named_modules() if isinstance(module, nn.Linear | CoMoLLinear))
    return sorted({name.removesuffix(".base_layer").rpartition(".")[2] for name in linears})


def narrowed_by(config: CoMoLConfig) -> str:
    """The settings that leave out some of what target_modules match, in words."""
    given = [
        f"{name}={getattr(config, name)!r}" for name in _NARROWING if getattr(config, name) not in (None, [], set())
    ]
    return f" (with {', '.join(given)})" if given else ""


def _base_modules(model: nn.Module) -> list[str]:
    """Names of the base's modules, without what adapters have brought."""
    adapted = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    return [name for name, _ in model.named_modules() if name and not (adapted and name.startswith(adapted))]


def _ends_in(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _first(name: str, modules: Collection[str]) -> Iterable[str]:
    """The modules, before all others the one of this very name, which ends the search for most whole names."""
    return chain([name] if name in modules else [], modules)


def _reached(modules: Iterable[str], config: CoMoLConfig, **changes: object) -> bool:
    settings = {name: getattr(config, name) for name in ("target_modules", *_NARROWING)}
    narrowed = SimpleNamespace(**settings | changes)
    return any(check_target_module_exists(narrowed, module) for module in modules)


def _no_match(setting: str, name: str, modules: Sequence[str], model: nn.Module) -> str:
    if setting == "target_modules" and is_all_linear(name):
        return f"target_modules {name} stands alone: name the Linears one by one, or drop the other names"
    parts = 1 + name.count(".")
    endings = {".".join(module.split(".")[-parts:]) for module in modules}
    named = sorted(ending for ending in endings if not ending.isdigit())
    near = ", ".join(difflib.get_close_matches(name, named, n=3))
    kinds, listed = ("Linear modules", linear_suffixes(model)) if setting == "target_modules" else ("modules", named)
    return (
        f"{setting} {name} match no module of the model{f'; near it: {near}' if near else ''};"
        f" its {kinds} end in: {', '.join(listed) or 'none'}"
    )
