"""vLLM plugin (entry point group vllm.general_plugins): CoMoL adapters beside plain LoRAs and the base, in one batch.

Experimental, and for vLLM 0.32 only: vLLM's LoRA classes are no public interface and move between minor versions, so
with any other version the plugin says so and changes nothing; the guard tensor then makes vLLM refuse the folders that
`vllm_lora` writes. Parity is tested on the CPU; nothing here was measured on a GPU.

What it adds: `_load_adapter` reads from a folder's configuration whether it is a CoMoL adapter and lets its guard pass;
`activate_adapter` notes r and E of the slot that an adapter moves into; and `add_expand` gates what the shrink left,
by tables that know r and E of each token's slot. The tables are tensors and no branch depends on them: a graph that
was compiled or captured before the first adapter was loaded serves every later one.

Glossary: N tokens, S slices of a fused Linear (q, k and v), W the server's max_lora_rank, R and E of an adapter.
"""

import functools
import logging
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch

from comol_ds.adapters.adapter_folder import CONFIG_FILE, TENSOR_FILE
from comol_ds.errors import UserError, one_line, shown
from comol_ds.export.vllm_lora import CONFIG_KEY, FORMAT_VERSION, GUARD, MAX_LORA_RANKS
from comol_ds.tensor_files import read_header
from comol_ds.text_files import read_json

VLLM_VERSION = "0.32"
_AGAIN = "export again"

logger = logging.getLogger("vllm.comol_ds")  # under vLLM's logger, so that its handlers print it


class GateSizes(NamedTuple):
    """R and E of the adapter in a slot."""

    r: int
    num_experts: int


PLAIN = GateSizes(1, 0)  # a LoRA without a gate
BASE = GateSizes(1, -1)  # no adapter at all

_guard_may_pass: ContextVar[bool] = ContextVar("guard_may_pass", default=False)


@functools.cache  # vLLM may call it more than once in a process
def register() -> None:
    """Entry point: vLLM calls it in every process it starts."""
    import vllm

    if vllm.__version__.split(".")[:2] != VLLM_VERSION.split("."):
        logger.warning(
            "comol_ds: the plugin is for vLLM %s.*, this is %s: CoMoL adapters will be refused, all else is unchanged",
            VLLM_VERSION,
            vllm.__version__,
        )
        return
    from vllm.lora import lora_model
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.worker_manager import WorkerLoRAManager

    _wrap(lora_model, "is_base_embedding_weights", _is_ignored_weight)
    _wrap(WorkerLoRAManager, "_load_adapter", _load_adapter)
    _wrap(LoRAModelManager, "_init_punica_wrapper", init_punica_wrapper)
    _wrap(LoRAModelManager, "activate_adapter", activate_adapter)


def gate(buffer: torch.Tensor, r: torch.Tensor, num_experts: torch.Tensor) -> torch.Tensor:
    """[h | logits | ...] -> z = softmax(logits) (x) h for tokens of CoMoL adapters.

    Those of plain LoRAs pass as they are. Those of the base become zero: on the CPU vLLM 0.32 adds the LoRA of the last
    slot to them, index -1 (github.com/vllm-project/vllm/pull/48421).

    Args:
        buffer: [..., N, W], what the shrink left; R + E <= E*R <= W.
        r, num_experts: [N], GateSizes of each token.

    Returns:
        [..., N, W]; from column E*R on the values mean nothing, lora_B is zero there.
    """
    width = buffer.shape[-1]
    column = torch.arange(width, device=buffer.device)
    r, num_experts = r.unsqueeze(-1), num_experts.unsqueeze(-1)  # [N, 1]
    is_logit = (column >= r) & (column < r + num_experts)  # [N, W]
    p = torch.softmax(buffer.masked_fill(~is_logit, float("-inf")), dim=-1)  # NaN without logits, dropped below
    p_columns = (r + column // r).clamp(max=width - 1)
    z = _columns(p, p_columns) * _columns(buffer, column % r)
    return torch.where(num_experts > 0, z, buffer).masked_fill(num_experts < 0, 0)


def _columns(values: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """values [..., N, W] at columns [N, W]."""
    return values.gather(-1, columns.expand(values.shape))


def _gated(cls: type) -> type:
    """A class of vLLM's punica wrapper, with the gate in front of its expand.

    Its instances need slot_r and slot_experts [slots + 1]: GateSizes of each LoRA slot, and at the end, where index -1
    finds them, of the base.
    """

    class Gated(cls):
        def add_expand(self, y: torch.Tensor, x: Any, *args: Any, **kwargs: Any) -> Any:
            slots = self._token_lora_indices[: x[0].shape[0]]  # [N], rows of padding included
            r, num_experts = self.slot_r[slots], self.slot_experts[slots]
            if isinstance(x, torch.Tensor):
                x = gate(x, r, num_experts)  # [S, N, W]
            else:
                x = tuple(gate(part, r, num_experts) for part in x)  # S times [N, W]
            return super().add_expand(y, x, *args, **kwargs)

    return Gated


def init_punica_wrapper(original: Callable, manager: Any, *args: Any) -> None:
    """Around LoRAModelManager._init_punica_wrapper: a gate in front of every expand, and its tables."""
    original(manager, *args)
    sizes = torch.tensor([PLAIN] * manager.lora_slots + [BASE], device=manager.device)  # [slots + 1, 2]
    for wrapper in _wrappers(manager):
        wrapper.__class__ = _gated(type(wrapper))
        wrapper.slot_r, wrapper.slot_experts = (column.clone() for column in sizes.unbind(1))
        wrapper._token_lora_indices.fill_(-1)  # uninitialized otherwise, and rows of padding are read


def activate_adapter(original: Callable, manager: Any, lora_id: int) -> bool:
    """Around LoRAModelManager.activate_adapter: the tables follow the adapter into its slot."""
    activated = original(manager, lora_id)
    if activated:
        sizes = getattr(manager._registered_adapters[lora_id], "comol_sizes", PLAIN)
        slot = manager.lora_index_to_id.index(lora_id)
        for wrapper in _wrappers(manager):
            wrapper.slot_r[slot] = sizes.r
            wrapper.slot_experts[slot] = sizes.num_experts
    return activated


def _load_adapter(original: Callable, worker_manager: Any, lora_request: Any) -> Any:
    """Around WorkerLoRAManager._load_adapter: what it returns remembers its sizes; the guard passes."""
    from vllm.lora.utils import get_adapter_absolute_path

    folder = Path(get_adapter_absolute_path(lora_request.lora_path))
    sizes = read_sizes(folder)
    if sizes is None:
        return original(worker_manager, lora_request)
    _check_sharding(folder, worker_manager.lora_config)
    token = _guard_may_pass.set(True)
    try:
        model = original(worker_manager, lora_request)
    finally:
        _guard_may_pass.reset(token)
    _check_layers(folder, worker_manager._adapter_manager, model)
    model.comol_sizes = sizes
    return model


def _is_ignored_weight(original: Callable, name: str) -> bool:
    return (name == GUARD and _guard_may_pass.get()) or original(name)


def read_sizes(folder: Path) -> GateSizes | None:
    """R and E of the CoMoL adapter in a LoRA folder; None for any other folder, which vLLM judges itself.

    vLLM compares neither the configuration with the tensors' shapes nor these with each other, and the gate would take
    columns of the wrong meaning.

    Raises:
        UserError: it is a CoMoL adapter of another version, or its numbers and its tensors' shapes contradict each
            other; or a file cannot be read.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        return None
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}; {_AGAIN}") from error
    found = values.get(CONFIG_KEY) if isinstance(values, dict) else None
    if found is None:
        return None
    version = found.get("version") if isinstance(found, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} is of version {shown(version)}, this plugin reads version {FORMAT_VERSION}: install the "
            "comol_ds that wrote it, or export again"
        )
    sizes = GateSizes(found.get("r"), found.get("num_experts"))
    if not all(type(size) is int and 1 <= size <= MAX_LORA_RANKS[-1] for size in sizes):
        raise UserError(f"{path} has r={shown(sizes.r)} and num_experts={shown(sizes.num_experts)}; {_AGAIN}")
    rank = sizes.r * sizes.num_experts
    if values.get("r") != rank or not sizes.r + sizes.num_experts <= rank <= MAX_LORA_RANKS[-1]:
        raise UserError(
            f"{path} has rank {shown(values.get('r'))}, but r={sizes.r} and num_experts={sizes.num_experts}; {_AGAIN}"
        )
    _check_shapes(folder / TENSOR_FILE, rank)
    return sizes


def _check_shapes(file: Path, rank: int) -> None:
    """Every module has a lora_A [rank, I] and a lora_B [O, rank], the file a guard and nothing else."""
    shapes = {tensor.name: tensor.shape for tensor in read_header(file)}
    if shapes.pop(GUARD, None) is None:
        raise UserError(f"{file} has no tensor {GUARD}; {_AGAIN}")
    for name, shape in shapes.items():
        module, _, part = name.removesuffix(".weight").rpartition(".")
        axis = {"lora_A": 0, "lora_B": 1}.get(part)
        if axis is None or len(shape) != 2 or shape[axis] != rank:
            raise UserError(f"{file}: {shown(name)} has shape {list(shape)}, the adapter's rank is {rank}; {_AGAIN}")
        other = f"{module}.{'lora_B' if part == 'lora_A' else 'lora_A'}.weight"
        if other not in shapes:
            raise UserError(f"{file}: {shown(name)} has no {shown(other)} beside it; {_AGAIN}")


def _check_sharding(folder: Path, lora_config: Any) -> None:
    from vllm.distributed import get_tensor_model_parallel_world_size

    ranks = get_tensor_model_parallel_world_size()
    if ranks > 1 and not lora_config.fully_sharded_loras:
        raise UserError(
            f"{folder} is a CoMoL adapter and tensor_parallel_size is {ranks}: start vLLM with --fully-sharded-loras, "
            "without it a rank would route on its part of the hidden state"
        )


def _check_layers(folder: Path, manager: Any, model: Any) -> None:
    """Every adapted module must have an expand that is gated; vLLM itself passes over modules it does not serve."""
    from vllm.distributed import get_pp_group
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    fused = {part: whole for whole, parts in manager.packed_modules.items() for part in parts}
    for name in model.loras:
        layer = manager.modules.get(fused.get(name, name))
        if layer is None and get_pp_group().world_size > 1:
            continue  # on another stage
        if not isinstance(layer, BaseLinearLayerWithLoRA):
            raise UserError(
                f"{folder} adapts {name}, which this server runs "
                + ("without LoRA; see --lora-target-modules" if layer is None else f"as {type(layer).__name__}")
            )


def _wrappers(manager: Any) -> list[Any]:
    """One per part of a multimodal model; several names may share one."""
    return list({id(wrapper): wrapper for wrapper in manager.punica_wrapper_mapping.values()}.values())


def _wrap(owner: Any, name: str, around: Callable) -> None:
    """owner.name becomes around(what it was, ...)."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapper(*args: Any) -> Any:
        return around(original, *args)

    setattr(owner, name, wrapper)
