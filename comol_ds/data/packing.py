"""Short records side by side in rows of max_length tokens, without attention across records.

A packed row carries position ids that start again at 0 with every record, and no attention mask: from that,
transformers (masking_utils.find_packed_sequence_indices) builds a mask that blocks attention between the records. It
does so only if the model keeps no cache, so the forward must be called with use_cache=False.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from comol_ds.data.tokenization import IGNORED


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Fill bins of `capacity` tokens by best-fit-decreasing: longest first, each into the fullest bin it fits.

    The number of bins depends on the lengths alone, not on their order; items of equal length are taken in the order
    given. O(n log n) for the sort and O(n log capacity) for the search among the distinct free sizes.

    Args:
        lengths: tokens of every item, each from 1 to `capacity`.
        capacity: tokens of a bin.

    Returns:
        item numbers of every bin; every item in exactly one bin.
    """
    sizes = np.asarray(lengths)
    assert sizes.size == 0 or (sizes.min() >= 1 and sizes.max() <= capacity), "a record does not fit into a bin"
    bins: list[list[int]] = []
    free: list[int] = []  # distinct free sizes above zero that some bin has, ascending
    bins_with: dict[int, list[int]] = {}  # free size -> bins
    order = np.argsort(-sizes, kind="stable")
    for item, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        place = bisect_left(free, size)
        if place == len(free):
            number, left = len(bins), capacity - size
            bins.append([item])
        else:
            room = free[place]
            number, left = bins_with[room].pop(), room - size
            if not bins_with[room]:
                del bins_with[room], free[place]
            bins[number].append(item)
        if left > 0:
            if left not in bins_with:
                insort(free, left)
                bins_with[left] = []
            bins_with[left].append(number)
    return bins


def join_records(records: Sequence[dict]) -> dict[str, list[int]]:
    """One packed row: `input_ids`, `labels`, `position_ids`, each as long as the records together.

    The first label of every record is masked, because its prediction would come from the record before.
    """
    row: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
    for record in records:
        row["input_ids"] += record["input_ids"]
        row["labels"] += [IGNORED, *record["labels"][1:]]
        row["position_ids"] += range(len(record["input_ids"]))
    return row
