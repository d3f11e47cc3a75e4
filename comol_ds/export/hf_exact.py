"""Export of base and adapter as one self-contained checkpoint with exact routing, for transformers and vLLM.

    config.json                     the base's, with the adapter's fields and auto_map
    modeling_comol.py               hf_exact_model.py for the base's classes; the reader needs no comol_ds
    <the base's weight files>       hard links where the file system allows, else copies; their bytes are not touched
    comol_adapter.safetensors       the adapter's tensors as they are, in fp32 as trained
    model.safetensors.index.json    which tensor lies in which of these
    tokenizer, generation_config.json, licenses: copies

The modelling code wraps Linears, whose weights thereby move from `q_proj.weight` to `q_proj.base_layer.weight`. It
registers that with transformers' checkpoint conversions (register_checkpoint_conversion_mapping, transformers 5.0 on),
which from_pretrained and vLLM's Transformers backend both apply, so a 70B base needs no second copy on the disk.
"""

import itertools
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from comol_ds.adapters.adapter_folder import split_tensors
from comol_ds.adapters.config import CoMoLConfig
from comol_ds.adapters.kept_tokenizer import tokenizer_paths
from comol_ds.errors import UserError, one_line
from comol_ds.export.hf_exact_check import check_checkpoint
from comol_ds.export.source import weights_in
from comol_ds.export.staged_folder import staged_folder
from comol_ds.files import copy_new, sync, write_new
from comol_ds.tensor_files import PLAIN_FLOATS, TensorFiles, read_header, save_tensors
from comol_ds.text_files import read_json

# Decoders whose Linears all lie in `model.layers`, and that vLLM's Transformers backend serves.
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text")

CODE_FILE = "modeling_comol.py"
ADAPTER_FILE = "comol_adapter.safetensors"
# transformers prefers a file named model.safetensors to the index.
SINGLE_FILE_AS = "base_model.safetensors"
_BASE_FILES = ("generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*")
_ADAPTED_MODULE = re.compile(r"model\.layers\.(\d+)\.(.+)")
_SAVED = "comol_saved."  # as in hf_exact_model.py
_ENDS = ("model.embed_tokens", "lm_head")


@dataclass(frozen=True)
class HfExactReport:
    """What was written.

    Attributes:
        modules: Linears with an adapter.
        adapter_bytes: size of the adapter's file.
        linked_bytes: weights whose bytes are shared with the base's folder.
        copied_bytes: weights of the base that were copied, since it lies on another file system.
    """

    modules: int
    adapter_bytes: int
    linked_bytes: int
    copied_bytes: int

    def lines(self) -> list[str]:
        """For a person to read."""
        shared = f"{self.linked_bytes / 1e9:.2f} GB shared with it (hard links)" if self.linked_bytes else ""
        copied = f"{self.copied_bytes / 1e9:.2f} GB copied" if self.copied_bytes else ""
        return [
            f"adapter on {self.modules} Linears, {self.adapter_bytes / 1e6:.2f} MB in {ADAPTER_FILE}",
            f"weights of the base: {', '.join(filter(None, (shared, copied)))}",
        ]


@dataclass(frozen=True)
class _Adapter:
    """modules: path in a layer -> the layers adapted there. saved: names of modules trained whole.
    tensors: under the names that the modelling file reads."""

    modules: dict[str, list[int]]
    saved: list[str]
    tensors: dict[str, torch.Tensor]


def write_hf_exact(
    base_folder: str | os.PathLike,
    config: CoMoLConfig,
    tensors: dict[str, torch.Tensor],
    output_dir: str | os.PathLike,
    *,
    overwrite: bool = False,
    tokenizer_folder: str | os.PathLike | None = None,
) -> HfExactReport:
    """Write a checkpoint that AutoModelForCausalLM loads with trust_remote_code, without this package.

    It is written and checked in a hidden folder beside output_dir, which is then renamed to it. Takes the memory of
    the adapter, whatever the base's size.

    Args:
        base_folder: the base model that the adapter was trained on, in safetensors, not quantized.
        config, tensors: the adapter, as `read_adapter` returns it.
        output_dir: the checkpoint's folder. The base's files in it may be hard links: replace them, never write into
            them.
        overwrite: replace a model that is there.
        tokenizer_folder: where the tokenizer is, if not in the base's folder.

    Raises:
        UserError: the base is quantized, of an unknown architecture, unreadable or does not fit the adapter; the
            adapter holds something that this form cannot; output_dir exists or cannot be written.
    """
    base, output = Path(base_folder), Path(output_dir).resolve()
    tokenizer = Path(tokenizer_folder or base)
    settings = _read_base_config(base)
    files = weights_in(base)
    _refuse_quantized(base, settings, files)
    adapter = _split(tensors, config)
    _refuse_tied(base, settings, adapter)
    needed = sum(tensor.nbytes for tensor in adapter.tensors.values()) + _bytes_elsewhere(files, output)
    with staged_folder(output, overwrite, needed, sources=(base, tokenizer)) as folder:
        others = _other_files(base, tokenizer, files)
        linked, copied = _place_weights(files, folder, others)
        save_tensors(adapter.tensors, folder / ADAPTER_FILE)
        _write_index(folder)
        for name, path in others.items():
            (folder / name).parent.mkdir(exist_ok=True)
            copy_new(path, folder / name)  # no link: these are files that people edit
        _write_json(folder / "config.json", settings | _adapter_settings(settings, config, adapter))
        write_new(folder / CODE_FILE, modelling_code(settings["model_type"]))
        check_checkpoint(folder, CODE_FILE, base)
        adapter_bytes = (folder / ADAPTER_FILE).stat().st_size
        for path in folder.rglob("*"):
            sync(path)
    return HfExactReport(sum(map(len, adapter.modules.values())), adapter_bytes, linked, copied)


def modelling_code(model_type: str) -> str:
    """The source of the modelling file for one of FAMILIES."""
    config_class = CONFIG_MAPPING[model_type]
    classes = {
        "LlamaConfig": config_class,
        "LlamaModel": MODEL_MAPPING[config_class],
        "LlamaForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING[config_class],
    }
    code = Path(__file__).with_name("hf_exact_model.py").read_text(encoding="utf-8")
    for name, found in classes.items():
        code = code.replace(f"import {name} as", f"import {found.__name__} as")
    return code


def _read_base_config(base: Path) -> dict[str, Any]:
    path = base / "config.json"
    if not path.is_file():
        raise UserError(f"{base} is not a model folder: config.json is missing")
    try:
        settings = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error
    kind = settings.get("model_type") if isinstance(settings, dict) else None
    if kind not in FAMILIES or "auto_map" in settings:
        own_code = " with its own code (auto_map)" if kind in FAMILIES else ""
        raise UserError(
            f"{path}: model type {kind!r}{own_code} is not supported by hf-exact, which knows {', '.join(FAMILIES)};"
            " use --format comol"
        )
    return settings


def _refuse_quantized(base: Path, settings: dict[str, Any], files: TensorFiles) -> None:
    found = next((tensor for tensor in files.by_name.values() if tensor.code not in PLAIN_FLOATS), None)
    if settings.get("quantization_config") is None and found is None:
        return
    what = "has a quantization_config" if found is None else f"stores tensor {found.name!r} as {found.code}"
    raise UserError(
        f"{base} {what}, a quantized model; give its float32, bfloat16 or float16 weights with --model_name_or_path"
    )


def _split(tensors: dict[str, torch.Tensor], config: CoMoLConfig) -> _Adapter:
    adapted, others = split_tensors(tensors, config)
    modules: dict[str, list[int]] = defaultdict(list)
    named = {f"{_SAVED}{path}": tensor for path, tensor in others.items()}
    for module, parameters in adapted.items():
        match = _ADAPTED_MODULE.fullmatch(module)
        if match is None:
            raise UserError(
                f"{module} has an adapter and lies outside model.layers, which hf-exact does not support; use"
                " --format comol"
            )
        modules[match[2]].append(int(match[1]))
        for name, tensor in parameters.items():
            # Only the cores are a parameter of their own, the others are the weights of Linears.
            named[f"{module}.{name}" if name == "comol_cores" else f"{module}.{name}.weight"] = tensor
    by_path = {path: sorted(layers) for path, layers in sorted(modules.items())}
    saved = sorted({path.rpartition(".")[0] for path in others})
    return _Adapter(by_path, saved, {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()})


def _refuse_tied(base: Path, settings: dict[str, Any], adapter: _Adapter) -> None:
    ends = [module for module in adapter.saved if module in _ENDS]
    if ends and CONFIG_MAPPING[settings["model_type"]].from_dict(settings).tie_word_embeddings:
        raise UserError(
            f"the adapter holds {ends[0]} trained whole (modules_to_save), which {base} ties to the other end of the"
            " model; hf-exact does not support that, use --format comol"
        )


def _adapter_settings(base: dict[str, Any], config: CoMoLConfig, adapter: _Adapter) -> dict[str, Any]:
    code = Path(CODE_FILE).stem
    return {
        "model_type": f"comol_{base['model_type']}",
        "architectures": ["CoMoLForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{code}.CoMoLModelConfig",
            "AutoModel": f"{code}.CoMoLModel",
            "AutoModelForCausalLM": f"{code}.CoMoLForCausalLM",
        },
        "comol_r": config.r,
        "comol_num_experts": config.num_experts,
        "comol_scaling": config.lora_alpha / config.r,
        "comol_router": config.router,
        "comol_modules": adapter.modules,
        "comol_saved": adapter.saved,
    }


def _bytes_elsewhere(files: TensorFiles, output: Path) -> int:
    """Size of the weight files on another file system than the output: they cannot be linked."""
    existing = next(path for path in output.parents if path.exists())
    states = [file.stat() for file in files.by_file]
    return sum(state.st_size for state in states if state.st_dev != existing.stat().st_dev)


def _place_weights(files: TensorFiles, folder: Path, taken: Iterable[str]) -> tuple[int, int]:
    """Link or copy the base's weight files; returns the bytes that were linked, and copied."""
    linked = copied = 0
    for source, name in _names_in_one_folder(files, taken).items():
        target, size = folder / name, source.stat().st_size
        try:
            os.link(source.resolve(), target)  # resolved: the hub's cache is made of symbolic links
            linked += size
        except OSError:  # another file system, or one without hard links
            copy_new(source, target)  # of what is there the bytes may be the base's own
            copied += size
    return linked, copied


def _names_in_one_folder(files: TensorFiles, others: Iterable[str]) -> dict[Path, str]:
    """A name for every weight file: vLLM reads one folder, shards may lie in several, under one name."""
    names: dict[Path, str] = {}
    taken = {SAFE_WEIGHTS_NAME, ADAPTER_FILE, *others}
    for source in files.by_file:
        wanted = SINGLE_FILE_AS if source == files.path else source.name
        numbered = (f"{number}_{wanted}" for number in itertools.count(2))
        names[source] = next(name for name in itertools.chain([wanted], numbered) if name not in taken)
        taken.add(names[source])
    return names


def _write_index(folder: Path) -> None:
    """An index of every tensor in the folder's files."""
    weight_map, total = {}, 0
    for path in sorted(folder.glob("*.safetensors")):
        for tensor in read_header(path):
            weight_map[tensor.name] = path.name
            total += tensor.stop - tensor.start
    _write_json(folder / SAFE_WEIGHTS_INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _other_files(base: Path, tokenizer: Path, files: TensorFiles) -> dict[str, Path]:
    """Path in the folder -> file of what is copied beside the weights; the tokenizer's folder is right about its own
    files."""
    found = {path.name: path for pattern in _BASE_FILES for path in sorted(base.glob(pattern)) if path.is_file()}
    found |= {str(path.relative_to(tokenizer)): path for path in tokenizer_paths(tokenizer)}
    return {name: path for name, path in found.items() if path not in files.by_file}


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_new(path, json.dumps(values, indent=2) + "\n")
