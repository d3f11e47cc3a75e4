"""Files as a run writes them, with routing that specializes as it trains; sizes are the caller's."""

import json
from pathlib import Path

import numpy as np

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DEMO_TASKS = ("arithmetic", "sort", "reverse", "replace", "calendar", "continue")


def layer_names(layers: int, targets: int) -> list[str]:
    """Module paths of a Llama."""
    parents = {name: "self_attn" if name in TARGETS[:4] else "mlp" for name in TARGETS}
    return [f"model.layers.{i}.{parents[t]}.{t}" for i in range(layers) for t in TARGETS[:targets]]


def statistics(gate: np.ndarray, tokens: np.ndarray) -> dict:
    """What a line holds of one layer or of one of its tasks. gate: [E]; tokens: [N, E] gates of sampled tokens."""
    entropy = -(gate * np.log(gate)).sum()
    per_token = -(tokens * np.log(tokens)).sum(-1).mean()
    return {
        "mean_gate": _round(gate),
        "argmax_share": _round(np.bincount(tokens.argmax(-1), minlength=len(gate)) / len(tokens)),
        "share_above_half": _round((tokens > 0.5).mean(0)),
        "entropy": round(float(per_token / np.log(len(gate))), 6) if len(gate) > 1 else 0.0,
        "effective_experts": round(float(np.exp(entropy)), 6),
        "cv": round(float(gate.std() / gate.mean()), 6),
        "max_min_ratio": round(float(gate.max() / gate.min()), 6),
        "update_ratio": round(float(0.02 + 0.1 * gate.max()), 6),
    }


def _round(values: np.ndarray) -> list[float]:
    return [round(float(value), 6) for value in values]


def line(
    step: int, split: str, names: list[str], experts: int, tasks: tuple[str, ...], sharpness: float, seed=0
) -> dict:
    """One line; ``sharpness`` 0 is uniform routing, 1 is where this training ends."""
    rng = np.random.default_rng(seed)  # the same preferences in every line
    counts = {task: 400 + 100 * i for i, task in enumerate(tasks)}
    share = np.array(list(counts.values()) or [1.0])
    share = share / share.sum()
    layers = {}
    for position, name in enumerate(names):
        depth = position / len(names)
        separation = sharpness * (0.5 + 2.5 * np.sin(np.pi * depth) ** 2) * (1.5 if "down" in name else 1.0)
        common = rng.normal(size=experts) * sharpness * (0.6 + 0.5 * depth)
        if position == len(names) // 3:
            common[0] += 8 * sharpness  # collapses
        if position % 11 == 5:
            common[rng.integers(experts)] -= 6 * sharpness  # dies
        wanted = rng.normal(size=(max(len(tasks), 1), experts)) * separation * 0.7
        noise = rng.normal(size=(24, experts)) * 1.2 * sharpness
        per_task = [_softmax(common + logits + noise) for logits in wanted]  # [24, E] each
        gates = [tokens.mean(0) for tokens in per_task]
        overall = sum(s * g for s, g in zip(share, gates, strict=True))
        value = statistics(overall, np.concatenate(per_task))
        value["core_cosine"] = round(float(1 - 0.5 * sharpness * (1 - depth)), 6)
        value["dead_experts"] = [int(e) for e in np.flatnonzero(overall < 0.01 * 8 / experts)]
        value["tasks"] = {task: statistics(gates[i], per_task[i]) for i, task in enumerate(tasks)}
        layers[name] = value
    tokens = {"all": sum(counts.values()) or 5120, **counts}
    return {"version": 1, "step": step, "split": split, "tokens": tokens, "layers": layers}


def _softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def write_lines(folder: Path, lines: list[dict]) -> Path:
    """Write router_load.jsonl into a folder; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "router_load.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
    return folder


def training(names, experts, tasks=(), steps=(0, 10, 20, 40), evaluations=(0, 40), seed=0, sharpness=1.0) -> list[dict]:
    """Lines of a run: training at every step, validation at some."""
    last = max(steps)
    grow = lambda step: sharpness * (0.05 + 0.95 * (step / last if last else 1) ** 0.5)  # noqa: E731
    lines = [line(step, "train", names, experts, tasks, grow(step), seed) for step in steps]
    lines += [line(step, "validation", names, experts, tasks, 0.95 * grow(step), seed) for step in evaluations]
    return sorted(lines, key=lambda one: one["step"])
