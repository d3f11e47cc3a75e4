"""What the routers' counters keep: sums on the device, in one buffer per split.

Glossary: E experts, G groups of tokens: all, the tasks, the rest.
"""

import math

import torch

from comol_ds.adapters.comol_layer import CoMoLLinear


class Sums:
    """What was counted for one split: views of one flat buffer, so that one collective reduces everything.

    Attributes:
        gates: layer -> [G, 3 E + 2], sums of the gates, of wins, of gates above 1/2, of the normalized entropy, and the
            number of tokens.
        squares: layer -> [G, 2], sums of ||s h M B^T||^2 and ||x W^T + b||^2 over tokens counted with detail.
        cosine: layer -> [2], sum of the cores' mean cosine, and how many were added.
    """

    def __init__(self, layers: dict[str, CoMoLLinear], adapter_name: str, groups: int, device: torch.device) -> None:
        shapes: dict[tuple[str, str], tuple[int, ...]] = {}
        for name, layer in layers.items():
            shapes["gates", name] = (groups, 3 * layer.num_experts[adapter_name] + 2)
            shapes["squares", name] = (groups, 2)
            shapes["cosine", name] = (2,)
        self.flat = torch.zeros(sum(map(math.prod, shapes.values())), dtype=torch.float64, device=device)
        parts = self.flat.split([math.prod(shape) for shape in shapes.values()])
        views = {key: part.view(shape) for (key, shape), part in zip(shapes.items(), parts, strict=True)}
        self.gates = {name: views["gates", name] for name in layers}
        self.squares = {name: views["squares", name] for name in layers}
        self.cosine = {name: views["cosine", name] for name in layers}
