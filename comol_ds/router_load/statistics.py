"""From sums to statistics: what `router_load.jsonl` says of a layer.

Glossary: E experts, p_e the gate of expert e, P_e its mean over the counted tokens.
"""

import math
from typing import Any

import torch

from comol_ds.router_load.sums import Sums

VERSION = 1  # of the records in router_load.jsonl
_DIGITS = 6  # written per number: fp32 sums are not better


def dead_below(experts: int) -> float:
    """The mean gate below which an expert is dead: 1 %, or half an equal share where that is less (more than 50)."""
    return min(0.01, 0.5 / experts)


def layer_statistics(sums: Sums, layer: str, groups: tuple[str, ...]) -> dict[str, Any]:
    """One layer's statistics.

    Args:
        sums: on the host, over all ranks.
        layer: its name.
        groups: names of the groups of tokens, the first being all.

    Returns:
        `group_statistics` over all tokens; ``core_cosine``: mean cosine of all pairs of different cores, None if it was
        not measured; ``dead_experts``: numbers of experts whose mean gate is below `dead_below`; ``tasks``:
        `group_statistics` of every other group that has tokens.
    """
    total, measured = sums.cosine[layer].tolist()
    both = zip(sums.gates[layer], sums.squares[layer].tolist(), strict=True)
    values = [group_statistics(gates, squares) if gates[-1] else None for gates, squares in both]
    limit = dead_below(len(values[0]["mean_gate"]))
    return {
        **values[0],
        "core_cosine": total / measured if measured else None,
        "dead_experts": [expert for expert, gate in enumerate(values[0]["mean_gate"]) if gate < limit],
        "tasks": {name: found for name, found in zip(groups[1:], values[1:], strict=True) if found is not None},
    }


def group_statistics(gates: torch.Tensor, squares: list[float]) -> dict[str, Any]:
    """Means over a group of tokens, from their sums: gates [3 E + 2] and squares [2], as in `Sums`.

    Returns:
        mean_gate: [E], P. argmax_share: [E], share of the tokens whose largest gate it is. share_above_half: [E], share
        of the tokens with p_e > 1/2. entropy: mean of -sum_e p_e ln p_e / ln E, from 0 to 1.
        effective_experts: exp(-sum_e P_e ln P_e), from 1 to E. cv: standard deviation of P over the experts / its mean.
        max_min_ratio: largest / smallest P, None if that is 0. update_ratio: ||s h M B^T|| / ||x W^T + b||, roots of
        sums over tokens, None if not measured.
    """
    experts = (gates.numel() - 2) // 3
    means = (gates[:-1] / gates[-1]).tolist()
    mean_gate = means[:experts]
    average = sum(mean_gate) / experts
    update, base = squares
    return {
        "mean_gate": mean_gate,
        "argmax_share": means[experts : 2 * experts],
        "share_above_half": means[2 * experts : 3 * experts],
        "entropy": means[-1],
        "effective_experts": math.exp(-sum(gate * math.log(gate) for gate in mean_gate if gate > 0)),
        "cv": math.sqrt(sum((gate - average) ** 2 for gate in mean_gate) / experts) / average,
        "max_min_ratio": max(mean_gate) / min(mean_gate) if min(mean_gate) > 0 else None,
        "update_ratio": math.sqrt(max(update, 0.0) / base) if base > 0 else None,
    }


def as_record(statistics: dict[str, Any], step: int, split: str) -> dict[str, Any]:
    """One line of router_load.jsonl: {"version", "step", "split", "tokens", "layers"}, numbers to 6 digits."""
    return {"version": VERSION, "step": step, "split": split, **_rounded(statistics)}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value
