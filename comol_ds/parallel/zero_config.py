"""What DeepSpeed would find out about the ZeRO block after the weights are loaded, asked before anything is built."""

from typing import Any

from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError

from comol_ds.errors import UserError
from comol_ds.parallel.groups import World


def check_zero_block(ds_config: dict[str, Any]) -> None:
    """Refuse a ``zero_optimization`` block that DeepSpeed would refuse after the weights are loaded.

    Raises:
        UserError: an unknown key or a value of the wrong kind, in DeepSpeed's words.
    """
    try:
        DeepSpeedZeroConfig(**ds_config["zero_optimization"])
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, ("zero_optimization", *first["loc"])))
        raise UserError(
            f"DeepSpeed JSON: {key} = {first['input']!r}: {first['msg']}; correct it or remove it"
        ) from error


def check_weight_storage(ds_config: dict[str, Any]) -> None:
    """Refuse what of the ZeRO block keeps weights as no machine's runs can.

    Raises:
        UserError: quantized frozen weights, or weights on NVMe.
    """
    block = ds_config["zero_optimization"]
    if block.get("zero_quantized_nontrainable_weights"):
        raise UserError(
            "DeepSpeed JSON: zero_optimization.zero_quantized_nontrainable_weights is refused: DeepSpeed 0.19 quantizes"
            " float16 weights only, and runs are bfloat16 or float32; remove it"
        )
    if (block.get("offload_param") or {}).get("device") == "nvme":
        raise UserError(
            "DeepSpeed JSON: zero_optimization.offload_param.device = 'nvme' is not supported: weights are read"
            " straight into memory; use 'cpu'"
        )


def check_quantized(ds_config: dict[str, Any]) -> None:
    """Refuse what of ZeRO++'s quantized communication cannot run on this machine; a plan may be for another one.

    Raises:
        UserError: quantized weights or gradients are to be sent, and there is no GPU.
    """
    block = ds_config["zero_optimization"]
    for key in ("zero_quantized_weights", "zero_quantized_gradients"):
        if block.get(key) and get_accelerator().device_name() == "cpu":
            raise UserError(
                f"DeepSpeed JSON: zero_optimization.{key} needs DeepSpeed's CUDA kernels and this machine has no GPU;"
                " remove it"
            )


def check_hpz(ds_config: dict[str, Any], world: World) -> None:
    """Refuse groups of ZeRO++'s second copy that would lie on two nodes.

    Raises:
        UserError: naming a size that works.
    """
    size = ds_config["zero_optimization"].get("zero_hpz_partition_size", 1)
    if size > 1 and world.local_size % size:
        raise UserError(
            f"DeepSpeed JSON: zero_optimization.zero_hpz_partition_size = {size} does not divide the"
            f" {world.local_size} ranks of a node, within which it keeps a second copy; use {world.local_size}"
            " or remove it"
        )
