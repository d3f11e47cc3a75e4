"""A static LoRA in memory: what the approximate exports share before they are written as an adapter or merged."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StaticLora:
    """An adapted Linear returns x W^T + (x A^T) B^T; all scaling stands in B.

    Attributes:
        down: module path in the base model, such as "model.layers.0.self_attn.q_proj" -> A [R, I], fp32 on the CPU.
        up: the same modules -> B [O, R], fp32 on the CPU.
        rank: R, the same for every module.
    """

    down: Mapping[str, torch.Tensor]
    up: Mapping[str, torch.Tensor]
    rank: int

    def __post_init__(self) -> None:
        assert self.down.keys() == self.up.keys()
        assert {a.shape[0] for a in self.down.values()} | {b.shape[1] for b in self.up.values()} == {self.rank}
