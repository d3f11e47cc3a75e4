"""What a base model's configuration says about its modules, without its weights."""

import os
from dataclasses import dataclass

import torch
from torch import nn

from comol_ds.base_config import NO_OWN_CODE, build_base, read_base_config


@dataclass(frozen=True)
class BaseModules:
    """Modules of a base model that an adapter can name.

    Attributes:
        sizes: path of every Linear (I, O) and Embedding (V, hidden size).
        layers: number of decoder layers.
        vocabulary: V.
        tied: the output head shares the embedding's weight.
        architecture: the class that wrote the checkpoint, None if its configuration does not say.
    """

    sizes: dict[str, tuple[int, int]]
    layers: int
    vocabulary: int
    tied: bool
    architecture: str | None


def read_base_modules(base: str | os.PathLike) -> BaseModules:
    """Modules of the base model in a folder, built on the meta device.

    Raises:
        UserError: it is no causal language model that transformers knows.
    """
    where = f"base model {os.fspath(base)!r}"
    remedy = "give the folder of the model the adapter was trained on"
    config = read_base_config(os.fspath(base), False, where, remedy=remedy, own_code=NO_OWN_CODE)
    architectures = config.architectures  # before from_config, which fills in its own
    with torch.device("meta"):
        model = build_base(config, False, where)
    text = config.get_text_config()
    return BaseModules(
        sizes={name: sizes for name, module in model.named_modules() if (sizes := _sizes(module))},
        layers=text.num_hidden_layers,
        vocabulary=text.vocab_size,
        tied=bool(text.tie_word_embeddings),
        architecture=architectures[0] if architectures else None,
    )


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return None
