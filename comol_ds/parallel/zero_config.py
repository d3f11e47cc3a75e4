"""DeepSpeed's own check of the ZeRO block, asked before anything is built."""

from typing import Any

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError

from comol_ds.errors import UserError


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
