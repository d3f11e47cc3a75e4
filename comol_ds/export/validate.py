"""Would a server read this adapter folder, and read it rightly? Answered from its files, without the server.

Three kinds of folder are known: a LoRA; a CoMoL adapter, which only PEFT with comol_ds imported reads; and CoMoL in the
form for vLLM with the plugin of comol_ds, a LoRA of rank E*R with a guard tensor. What a fault does to a server stands
in `servers.CONSEQUENCES`.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from comol_ds.adapters.adapter_folder import CONFIG_FILE, TENSOR_FILE, read_adapter
from comol_ds.errors import UserError, one_line
from comol_ds.export.base_modules import BaseModules, read_base_modules
from comol_ds.export.config_faults import config_faults, file_faults
from comol_ds.export.servers import SERVERS, Fault
from comol_ds.export.tensor_faults import sort_tensors, tensor_faults
from comol_ds.tensor_files import StoredTensor, read_header
from comol_ds.text_files import read_json

GATED_KEY = "comol"  # of adapter_config.json in the form for vLLM
GUARD_PREFIX = "comol_guard"
# An adapter of such a kind is not what the server serves, so that its other faults say nothing.
WRONG_FORMS = {"CoMoL form", "gated form", "gated form called LORA", "other peft_type"}
# What no other way of writing the adapter could change: --check reports it, a writer does not refuse because of it.
LIMITS = {"architecture", "module not served", "rank too high", "tied vocabulary", "vocabulary too large"}
# Text-only decoders among the architectures that llama.cpp's converter registers, with separate q, k, v and gate, up.
LLAMACPP_ARCHITECTURES = {
    "CohereForCausalLM", "Exaone4ForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "GemmaForCausalLM",
    "GraniteForCausalLM", "LlamaForCausalLM", "MistralForCausalLM", "Olmo2ForCausalLM", "OlmoForCausalLM",
    "Qwen2ForCausalLM", "Qwen3ForCausalLM", "SeedOssForCausalLM", "SmolLM3ForCausalLM", "StableLmForCausalLM",
}  # fmt: skip


def validate_folder(
    folder: str | os.PathLike, servers: Sequence[str] = SERVERS, base: str | os.PathLike | None = None
) -> None:
    """Refuse an adapter folder that one of the servers would refuse or misread for a reason that lies in the folder.

    Raises:
        UserError: the first problem, and how many more there are; or as in `check_servers`.
    """
    faults = [fault for fault in _read_faults(folder, servers, base) if fault.kind not in LIMITS]
    for server in servers:
        if problems := _lines(faults, server):
            more = len(problems) - 1
            rest = f" ({more} more: python launch/export.py --check {folder} --for {server})" if more else ""
            raise UserError(problems[0] + rest)


def check_folder(folder: str | os.PathLike, server: str, base: str | os.PathLike | None = None) -> list[str]:
    """Problems that one server has with an adapter folder, see `check_servers`."""
    return check_servers(folder, (server,), base)[server]


def check_servers(
    folder: str | os.PathLike, servers: Sequence[str] = SERVERS, base: str | os.PathLike | None = None
) -> dict[str, list[str]]:
    """Problems that servers have with an adapter folder, whose tensors are read once.

    Args:
        folder: the adapter folder.
        servers: some of SERVERS.
        base: folder or hub name of the base model, to compare modules and features with; None takes the one that the
            adapter names, if that is a folder on this machine.

    Returns:
        server -> one line per kind of fault: where and what, what the server does, remedy. Faults of one kind share a
        line, which names the first and counts the others. No line: nothing was found.

    Raises:
        UserError: there is no such folder or server, or `base` cannot be read.
    """
    faults = _read_faults(folder, servers, base)
    return {server: _lines(faults, server) for server in servers}


def _read_faults(folder: str | os.PathLike, servers: Sequence[str], base: str | os.PathLike | None) -> list[Fault]:
    for server in servers:
        if server not in SERVERS:
            raise UserError(f"--for {server}: choose from {', '.join(SERVERS)}")
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give an adapter folder")
    return list(_faults(folder, base))


def _lines(faults: Iterable[Fault], server: str) -> list[str]:
    """What a server's user should know; nothing but the kind of adapter if the server does not take that kind."""
    kinds: dict[str, list[Fault]] = {}
    for fault in faults:
        if fault.harms(server):
            kinds.setdefault(fault.kind, []).append(fault)
    shown = [kind for kind in kinds if kind in WRONG_FORMS] or kinds
    return [kinds[kind][0].line(server, others=len(kinds[kind]) - 1) for kind in shown]


def _faults(folder: Path, base: str | os.PathLike | None) -> Iterator[Fault]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        yield Fault("no config", str(folder), f"{CONFIG_FILE} is missing", "give an adapter folder")
        return
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, not JSON
        what = f"is no JSON, {one_line(error)}"
        yield Fault("config unreadable", str(path), what, "export or copy the adapter again")
        return
    if not isinstance(config, dict):
        yield Fault("config unreadable", str(path), "is no JSON object", "export or copy the adapter again")
        return
    yield from _form_faults(config, path)
    if config.get("peft_type") == "COMOL":
        yield from _comol_faults(folder)
    elif config.get("peft_type", "LORA") == "LORA" or _gate_of(config) is not None:
        yield from file_faults(folder)
        yield from config_faults(config, path)
        yield from _file_and_base_faults(folder, config, base)


def _form_faults(config: dict[str, Any], path: Path) -> Iterator[Fault]:
    """Which kind of adapter it is, for the servers that do not take it."""
    peft_type = config.get("peft_type")
    if peft_type == "COMOL":
        remedy = "export it with --format lora, or for vLLM with --format vllm-lora"
        yield Fault("CoMoL form", str(path), "peft_type is COMOL, a token-dependent adapter", remedy)
    elif _gate_of(config) is not None:
        kind = "gated form called LORA" if peft_type == "LORA" else "gated form"
        remedy = "serve it with vLLM and the plugin of comol_ds, or export it with --format lora"
        yield Fault(kind, str(path), f"{GATED_KEY} makes it a CoMoL adapter for vLLM", remedy)
    elif "peft_type" not in config:
        yield Fault("no peft_type", str(path), "peft_type is missing", 'write "peft_type": "LORA"')
    elif peft_type != "LORA":
        yield Fault("other peft_type", str(path), f"peft_type is {peft_type!r}", "give a LORA or COMOL adapter")


def _comol_faults(folder: Path) -> Iterator[Fault]:
    try:
        read_adapter(folder)
    except UserError as error:
        what = str(error).replace(f"{folder}{os.sep}", "")
        yield Fault("CoMoL adapter", str(folder), what, "export it again with --format comol")


def _file_and_base_faults(folder: Path, config: dict[str, Any], base: str | os.PathLike | None) -> Iterator[Fault]:
    path, gated = folder / CONFIG_FILE, _gate_of(config)
    modules = _base_of(config, base)
    if modules and modules.architecture not in LLAMACPP_ARCHITECTURES:
        what = f"the base model's architecture is {modules.architecture}"
        remedy = "try convert_lora_to_gguf.py --dry-run"
        yield Fault("architecture", str(path), what, remedy)
    file = folder / TENSOR_FILE
    if not file.is_file():
        return
    try:
        tensors = read_header(file)
    except UserError as error:
        what = f"is damaged, {str(error).removeprefix(f'{file} ')}"
        yield Fault("tensors unreadable", str(file), what, "export or copy the adapter again")
        return
    if gated is not None:
        yield from _gate_faults(config, gated, tensors, file)
        tensors = [tensor for tensor in tensors if not tensor.name.startswith(GUARD_PREFIX)]
    yield from tensor_faults(sort_tensors(tensors, file), config, modules)


def _gate_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """What the form for vLLM says about its experts; None if the folder is of another form."""
    gated = config.get(GATED_KEY)
    return gated if isinstance(gated, dict) else None


def _gate_faults(
    config: dict[str, Any], gated: dict[str, Any], tensors: Iterable[StoredTensor], file: Path
) -> Iterator[Fault]:
    remedy = "export it again with --format vllm-lora"
    if not any(tensor.name.startswith(GUARD_PREFIX) for tensor in tensors):
        yield Fault("gated form unguarded", str(file), f"has no {GUARD_PREFIX} tensor", remedy)
    core, experts, rank = gated.get("r"), gated.get("num_experts"), config.get("r")
    if type(core) is not int or type(experts) is not int or min(core, experts) < 1 or rank != core * experts:
        what = f"r is {rank}, {GATED_KEY} has r={core} and num_experts={experts}, whose product it must be"
        yield Fault("gated rank", str(file.with_name(CONFIG_FILE)), what, remedy)


def _base_of(config: dict[str, Any], base: str | os.PathLike | None) -> BaseModules | None:
    if base is not None:
        return read_base_modules(base)
    named = config.get("base_model_name_or_path")
    if not isinstance(named, str) or not os.path.isfile(os.path.join(named, "config.json")):
        return None
    try:
        return read_base_modules(named)
    except UserError:  # a model with its own code, say; the caller did not ask for the comparison
        return None
