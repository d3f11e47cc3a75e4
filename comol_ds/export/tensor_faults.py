"""Faults of an adapter folder's LoRA tensors: names, pairs, shapes, ranks, values, and how they cover the layers."""

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors import safe_open

from comol_ds.adapters.adapter_folder import KEY_PREFIX
from comol_ds.adapters.expressions import check_matching_ends
from comol_ds.errors import UserError
from comol_ds.export.base_modules import BaseModules
from comol_ds.export.config_faults import pattern_of, rank_of
from comol_ds.export.servers import Fault
from comol_ds.tensor_files import PLAIN_FLOATS, StoredTensor

FUSED = {"fused q, k, v": ("q_proj", "k_proj", "v_proj"), "fused gate, up": ("gate_proj", "up_proj")}
_FUSED_NAMES = {
    "qkv_proj": "fused q, k, v",
    "query_key_value": "fused q, k, v",
    "c_attn": "fused q, k, v",
    "gate_up_proj": "fused gate, up",
}
MAX_VOCABULARY_VLLM = 258048
_LORA_KEY = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<part>[AB])(?:\.(?P<name>[^.]+))?\.weight|lora_embedding_(?P<emb>[AB]))"
)
_LAYER = re.compile(r"(?P<above>.*\blayers)\.(?P<layer>\d+)\.(?P<below>.+)")
_SERVED_BY_TGI = re.compile(
    r"model\.layers\.\d+\.(self_attn\.(q|k|v|o|qkv)_proj|mlp\.(gate_proj|up_proj|down_proj|c_fc|c_proj))"
)


@dataclass(frozen=True)
class LoraTensors:
    """The tensors of a folder.

    Attributes:
        file: where they are.
        pairs: module path in the base model -> {"A": lora_A [R, I], "B": lora_B [O, R]}, what there is of them.
        others: tensors that are no part of a LoRA, or of one that has that part already.
    """

    file: Path
    pairs: Mapping[str, Mapping[str, StoredTensor]]
    others: list[StoredTensor]

    @property
    def all(self) -> list[StoredTensor]:
        return [tensor for pair in self.pairs.values() for tensor in pair.values()] + self.others


def sort_tensors(tensors: list[StoredTensor], file: Path) -> LoraTensors:
    """Which tensors are a LoRA's and which are not, by their names."""
    pairs: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    others = []
    for tensor in tensors:
        match = _LORA_KEY.fullmatch(tensor.name)
        pair = pairs[match["module"].removeprefix(KEY_PREFIX)] if match else {}
        if match and (part := match["part"] or match["emb"]) not in pair:
            pair[part] = tensor
        else:
            others.append(tensor)
    return LoraTensors(file, dict(pairs), others)


def tensor_faults(lora: LoraTensors, config: dict[str, Any], base: BaseModules | None) -> Iterator[Fault]:
    """All that is wrong with the tensors.

    Args:
        lora: the tensors, without those that belong there for another reason.
        config: adapter_config.json.
        base: the base model, if it is known; without it modules and features are not compared.
    """
    where = str(lora.file)
    if not lora.pairs and not lora.others:
        yield Fault("no tensors", where, "holds no tensors", "export the adapter again")
    try:
        check_matching_ends(SimpleNamespace(**config), lora.pairs)
    except UserError as error:
        yield Fault("config unreadable", where, f"has a configuration whose {error}", "name the modules themselves")
        return
    yield from _name_faults(lora, base, where)
    yield from _target_faults(lora, config, where)
    for module, pair in lora.pairs.items():
        yield from _pair_faults(module, pair, where)
    yield from _shape_faults(lora, config, base, where)
    yield from _coverage_faults(lora, base, where)
    yield from _value_faults(lora, where)


def _name_faults(lora: LoraTensors, base: BaseModules | None, where: str) -> Iterator[Fault]:
    for tensor in lora.others:
        if _LORA_KEY.fullmatch(tensor.name):
            what = f"{tensor.name} is the second of its kind for its module"
            yield Fault("tensor given twice", where, what, "keep one adapter's tensors in a folder")
        else:
            yield Fault("extra tensor", where, f"{tensor.name} is neither lora_A nor lora_B", "remove it")
    for tensor in lora.all:
        match = _LORA_KEY.fullmatch(tensor.name)
        if match and match["name"]:
            bare = tensor.name.replace(f".{match['name']}.weight", ".weight")
            yield Fault("adapter's name", where, f"{tensor.name} has an adapter's name in it", f"rename it to {bare}")
        if match and not tensor.name.startswith(KEY_PREFIX):
            remedy = f"rename it to {KEY_PREFIX}{tensor.name}"
            yield Fault("no prefix", where, f"{tensor.name} lacks PEFT's prefix", remedy)
    for module in lora.pairs:
        yield from _module_faults(module, base, where)


def _module_faults(module: str, base: BaseModules | None, where: str) -> Iterator[Fault]:
    fused = _FUSED_NAMES.get(module.rpartition(".")[2])
    known = base is None or module in base.sizes
    if fused and (base is None or not known):
        parts = FUSED[fused]
        remedy = f"split lora_B's rows into {', '.join(parts)}, each with a copy of lora_A"
        yield Fault(fused, where, f"{module} is a fused module", remedy)
    elif not known:
        remedy = "check the base model, or remove its tensors"
        yield Fault("unknown module", where, f"{module} is no Linear or Embedding of the base model", remedy)
    elif not _SERVED_BY_TGI.fullmatch(module):
        yield Fault("module not served", where, f"{module} is adapted", "train without it or serve a merged model")
    name = module.rpartition(".")[2]
    if base is not None and name in ("lm_head", "embed_tokens"):
        remedy = "train without it or serve a merged model"
        if base.tied:
            what = f"{module} is adapted, and embedding and lm_head share one weight"
            yield Fault("tied vocabulary", where, what, remedy)
        if name == "lm_head" and base.vocabulary > MAX_VOCABULARY_VLLM:
            yield Fault("vocabulary too large", where, f"{module} has {base.vocabulary} tokens", remedy)


def _target_faults(lora: LoraTensors, config: dict[str, Any], where: str) -> Iterator[Fault]:
    targets = config.get("target_modules")
    if not targets or targets == "all-linear":
        return
    names = ("exclude_modules", "layers_to_transform", "layers_pattern")
    settings = SimpleNamespace(target_modules=targets, **{name: config.get(name) for name in names})
    for module in lora.pairs:
        try:
            reached = check_target_module_exists(settings, module)
        except (re.error, TypeError):  # no regular expression, or no list of names
            reached = False
        if not reached:
            remedy = f"add {module.rpartition('.')[2]} to them or remove the tensors"
            yield Fault("tensors not targeted", where, f"{module} has tensors, target_modules do not reach it", remedy)


def _pair_faults(module: str, pair: Mapping[str, StoredTensor], where: str) -> Iterator[Fault]:
    for part, other in (("A", "B"), ("B", "A")):
        if part not in pair:
            yield Fault(f"no lora_{part}", where, f"{module} has lora_{other} only", "export the adapter again")
    for tensor in pair.values():
        shape = list(tensor.shape)
        if tensor.shape == (0,):
            remedy = "gather ZeRO-3 partitions before saving"
            yield Fault("not gathered", where, f"{tensor.name} is empty, shape {shape}", remedy)
        elif len(shape) != 2:
            yield Fault("no matrix", where, f"{tensor.name} has shape {shape}", "write a matrix")
        elif 0 in shape:
            yield Fault("no rank", where, f"{tensor.name} has shape {shape}", "export with a rank of at least 1")


def _shape_faults(lora: LoraTensors, config: dict[str, Any], base: BaseModules | None, where: str) -> Iterator[Fault]:
    rank = rank_of(config) or _usual_rank(lora)
    patterns = pattern_of(config, "rank_pattern")
    off: list[tuple[StoredTensor, int, int]] = []  # lora_A, its rank, the configuration's
    for module, pair in lora.pairs.items():
        expected = _patterned(patterns, module, rank)
        sizes = base.sizes.get(module) if base else None
        usable = {part: tensor for part, tensor in pair.items() if len(tensor.shape) == 2 and 0 not in tensor.shape}
        faults = {part: _orientation_fault(tensor, part, expected, sizes, where) for part, tensor in usable.items()}
        yield from filter(None, faults.values())
        if len(usable) < 2 or any(faults.values()):
            continue
        rows, columns = usable["A"].shape[0], usable["B"].shape[1]
        if rows != columns:
            what = f"{module} has a lora_A of {rows} rows and a lora_B of {columns} columns"
            yield Fault("ranks of a pair", where, what, "export the adapter again")
        elif rows != expected:
            off.append((usable["A"], rows, expected))
    found = {rows for _, rows, _ in off}
    if len(found) == 1 and len(off) == len(lora.pairs):
        what = f"r is {rank}, the tensors have rank {found.pop()}"
        yield Fault("r differs", str(lora.file.with_name("adapter_config.json")), what, "write the tensors' rank")
        return
    for tensor, rows, expected in off:
        what = f"{tensor.name} has rank {rows} where the configuration says {expected}"
        yield Fault("mixed ranks", where, what, "pad all modules with zeros to one rank")


def _patterned(patterns: Mapping[str, Any], module: str, rank: int) -> Any:
    """A module's rank by rank_pattern, as PEFT reads it."""
    try:
        return patterns.get(get_pattern_key(patterns.keys(), module), rank)
    except re.error:  # a pattern that PEFT cannot read either
        return rank


def _usual_rank(lora: LoraTensors) -> int:
    """Of a folder whose configuration does not say."""
    rows = Counter(pair["A"].shape[0] for pair in lora.pairs.values() if "A" in pair and pair["A"].shape)
    return rows.most_common(1)[0][0] if rows else 0


def _orientation_fault(
    tensor: StoredTensor, part: str, rank: int, sizes: tuple[int, int] | None, where: str
) -> Fault | None:
    """lora_A is [R, I] and lora_B is [O, R]; one whose sides are equal cannot be seen to be transposed."""
    features, found_rank = (tensor.shape[1], tensor.shape[0]) if part == "A" else tensor.shape
    right, letter = (sizes and sizes[part == "B"]), "I" if part == "A" else "O"
    form = "[r, in_features]" if part == "A" else "[out_features, r]"
    shape = list(tensor.shape)
    if (found_rank == right) if right else (features == rank != found_rank):
        if features == right:
            return None
        return Fault(f"lora_{part} transposed", where, f"{tensor.name} has shape {shape}, not {form}", "transpose it")
    if right and features != right:
        what = f"{tensor.name} has shape {shape}, the base model's {letter} is {right} there"
        return Fault("size of the base", where, what, "name the base model it was trained on")
    return None


def _coverage_faults(lora: LoraTensors, base: BaseModules | None, where: str) -> Iterator[Fault]:
    layers_of: dict[tuple[str, str], set[int]] = defaultdict(set)  # ("model.layers", "mlp.up_proj") -> layers
    for module in lora.pairs:
        if match := _LAYER.fullmatch(module):
            layers_of[match["above"], match["below"]].add(int(match["layer"]))
    last = max((layer for layers in layers_of.values() for layer in layers), default=-1)
    count = base.layers if base else last + 1
    for (above, below), layers in layers_of.items():
        absent = [layer for layer in range(count) if layer not in layers]
        missing = [layer for layer in absent if base is None or f"{above}.{layer}.{below}" in base.sizes]
        if missing:
            what = f"{above}.*.{below} has no tensors in layer {', '.join(map(str, missing))} of {count}"
            yield Fault("layer missing", where, what, "add zero-filled pairs there")
    yield from _sibling_faults(layers_of, base, where)


def _sibling_faults(
    layers_of: Mapping[tuple[str, str], set[int]], base: BaseModules | None, where: str
) -> Iterator[Fault]:
    parents = {(above, below.rpartition(".")[0]) for above, below in layers_of}
    for (above, parent), group in itertools.product(sorted(parents), FUSED.values()):
        found = {name: layers_of.get((above, f"{parent}.{name}"), set()) for name in group}
        adapted = set().union(*found.values())
        for name, layers in found.items():
            modules = [f"{above}.{layer}.{parent}.{name}" for layer in sorted(adapted - layers)]
            lacking = [module for module in modules if base is None or module in base.sizes]
            if lacking:
                what = f"{lacking[0]} has no tensors, {' or '.join(other for other in group if other != name)} has"
                yield Fault("siblings missing", where, what, f"add a zero-filled pair for {name} in every layer")


def _value_faults(lora: LoraTensors, where: str) -> Iterator[Fault]:
    with safe_open(lora.file, "pt") as file:
        for tensor in lora.all:
            if tensor.code not in PLAIN_FLOATS:
                what = f"{tensor.name} has dtype {tensor.code}"
                yield Fault("quantized", where, what, "write it in float32, float16 or bfloat16")
                continue
            values = file.get_tensor(tensor.name)
            if torch.isnan(values).any():
                yield Fault("NaN", where, f"{tensor.name} holds NaN", "export an earlier checkpoint")
            elif torch.isinf(values).any():
                what = f"{tensor.name} holds infinite values"
                yield Fault("infinite", where, what, "export in a wider dtype or an earlier checkpoint")
