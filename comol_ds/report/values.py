"""What the report computes from mean gates: how much an expert tells about the task, and the like.

T tasks, L layers, E experts. Gates of a task are means over its tokens, so a row over the experts sums to 1.
"""

import numpy as np

COLLAPSED = 0.9  # mean gate of one expert above which a layer's routing has collapsed


def entropy_bits(weights: np.ndarray) -> float:
    """Entropy of a distribution given by weights that need not sum to 1."""
    p = weights / weights.sum()
    return float(-(p * np.log2(np.where(p > 0, p, 1))).sum())


def mutual_information(tokens: np.ndarray, gates: np.ndarray) -> np.ndarray:
    """I(task; expert) in bits per layer, where a token of task t goes to expert e with the task's mean gate.

    I = sum over t, e of p(t) p(e|t) log2(p(e|t) / p(e)), p(e) = sum over t of p(t) p(e|t). Mean gates hide how a task's
    own tokens differ, which is no information about the task.

    Args:
        tokens: [T] tokens of each task, of which p(t) are the shares.
        gates: [T, L, E] mean gates.

    Returns:
        [L]; between 0 (every task routes alike) and min(H(task), log2 E).
    """
    share = tokens / tokens.sum()
    p = gates / gates.sum(-1, keepdims=True)  # p(e|t)
    overall = np.einsum("t,tle->le", share, p)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_ratio = np.where(p > 0, np.log2(p / overall), 0.0)
    log_ratio = np.where(np.isnan(p), np.nan, log_ratio)
    return np.maximum(np.einsum("t,tle,tle->l", share, p, log_ratio), 0.0)


def information_limit(tokens: np.ndarray, experts: int) -> float:
    """The most that I(task; expert) can be, in bits: min(H(task), log2 E)."""
    return min(entropy_bits(tokens), float(np.log2(experts)))


def task_distances(gates: np.ndarray) -> np.ndarray:
    """[T, T] total variation distance, 0 to 1, between two tasks' mean gates, averaged over the layers.

    Half the sum over experts of |p(e|t) - p(e|u)|: the share of tokens that would have to change expert.
    """
    p = gates / gates.sum(-1, keepdims=True)
    pairs = np.stack([np.abs(p - task).sum(-1) for task in p]) / 2  # T, T, L
    known = ~np.isnan(pairs)
    return np.where(known, pairs, 0).sum(-1) / np.maximum(known.sum(-1), 1)


def preference(tokens: np.ndarray, gates: np.ndarray) -> np.ndarray:
    """[T, L, E] by how many uniform shares (1/E) a task's mean gate exceeds the layer's mean over all tasks."""
    overall = np.einsum("t,tle->le", tokens / tokens.sum(), gates)
    return (gates - overall) * gates.shape[-1]


def largest(mean_gate: np.ndarray) -> np.ndarray:
    """[L] mean gate of the layer's busiest expert; NaN where the layer holds anything that is not finite."""
    return mean_gate.max(-1)


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """At most ``wanted`` of the positions 0 to count - 1, with the first and the last."""
    return sorted({round(position) for position in np.linspace(0, count - 1, min(count, wanted))})


def nan_mean(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """Mean of what is not NaN; NaN, without a warning, where nothing is left."""
    known = ~np.isnan(values)
    count = known.sum(axis)
    return np.where(count > 0, np.where(known, values, 0).sum(axis) / np.maximum(count, 1), np.nan)
