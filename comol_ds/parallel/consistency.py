"""Checks that tensor-parallel peers still work on the same thing: the batches of a step, and the replicated parameters.

Nothing else would notice. Peers that read other records, or whose copies of a replicated parameter have drifted apart,
add up terms that do not belong together; the loss stays finite and the adapter is wrong.
"""

import hashlib
from collections import Counter
from typing import Any

import torch

from comol_ds.parallel.groups import gather_objects, mesh


def check_same_batch(micro_batches: list[dict[str, Any]], step: int) -> None:
    """Compare this step's micro-batches, record ids included, within each tensor-parallel group. A collective call.

    A group of one rank has nothing to compare, and nothing is sent.

    Args:
        micro_batches: what this rank is about to train on; values are tensors, on any device, or lists of strings.
        step: number of the step, for the message.

    Raises:
        RuntimeError: on every rank of the world, if in any group the batches differ.
    """
    if mesh().grid.tensor_parallel == 1:
        return
    items = [item for batch in micro_batches for name in sorted(batch) for item in (name, batch[name])]
    digests = gather_objects(_digest(len(micro_batches), *items), f"compare the batches of step {step}")
    if groups := _differing_groups(digests):
        raise RuntimeError(
            f"tensor-parallel ranks {_names(groups[0])} see different batches at step {step}:"
            f" {_who_differs(groups[0], digests)}{_more(groups)}. They share one copy of the model and must read the"
            " same records: look for data files, caches or settings that differ between the ranks"
        )


def check_same_replicas(model: torch.nn.Module, step: int) -> None:
    """Compare the replicated trainable parameters, bit by bit, within each tensor-parallel group. A collective call.

    Each rank digests what it holds itself: under ZeRO-3 its partition, which its tensor-parallel peers hold too. One
    digest of all parameters is sent; only where it differs are those of the single parameters.

    Args:
        model: any state between two steps; sharded parameters carry ``shard``, ZeRO-3's ``ds_tensor``.
        step: number of the step, for the message.

    Raises:
        RuntimeError: on every rank of the world, if in any group a parameter differs.
    """
    grid = mesh().grid
    if grid.tensor_parallel == 1:
        return
    own = {name: _digest(_held(p, grid.dp_rank)) for name, p in model.named_parameters() if _is_replicated(p)}
    digests = gather_objects(_digest(*own.values()), f"compare the replicated parameters at step {step}")
    groups = _differing_groups(digests)
    if not groups:
        return
    ranks = groups[0]
    reports = gather_objects(own if grid.rank in ranks else None, f"find the parameters that differ at step {step}")
    differing = [name for name in reports[ranks[0]] if len({reports[rank][name] for rank in ranks}) > 1]
    raise RuntimeError(
        f"tensor-parallel ranks {_names(ranks)} hold different copies of replicated parameters at step {step}:"
        f" {_who_differs(ranks, digests)} in {len(differing)} of {len(own)} parameters, first {differing[0]}"
        f"{_more(groups)}. Faulty hardware or a non-deterministic kernel may be the cause; resume from the last"
        " checkpoint"
    )


def _is_replicated(parameter: torch.nn.Parameter) -> bool:
    return parameter.requires_grad and not hasattr(parameter, "shard")


def _held(parameter: torch.nn.Parameter, dp_rank: int) -> torch.Tensor:
    """This rank's values of a parameter. The padding behind a ZeRO-3 partition is memory that nobody has written."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter.data
    partition = parameter.ds_tensor
    behind = parameter.ds_numel - dp_rank * partition.numel()
    return partition[: max(0, behind)]


def _digest(*items: Any) -> bytes:
    """BLAKE2b over shape, dtype and bytes of tensors, and the representation of anything else."""
    digest = hashlib.blake2b(digest_size=16)
    for item in items:
        if isinstance(item, torch.Tensor):
            digest.update(f"{item.dtype}{tuple(item.shape)}".encode())
            digest.update(item.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        else:
            digest.update(repr(item).encode())
    return digest.digest()


def _differing_groups(digests: list[bytes]) -> list[list[int]]:
    """The tensor-parallel groups, as ranks, in which not all have one digest; the same list on every rank."""
    return [ranks for ranks in mesh().grid.tensor_groups() if len({digests[rank] for rank in ranks}) > 1]


def _who_differs(ranks: list[int], digests: list[bytes]) -> str:
    """ "rank 3 differs from rank 2": the others from the largest part that agrees; at a tie, the first rank's part."""
    usual, _ = Counter(digests[rank] for rank in ranks).most_common(1)[0]
    agree = [rank for rank in ranks if digests[rank] == usual]
    others = [rank for rank in ranks if digests[rank] != usual]
    verb = "rank {} differs" if len(others) == 1 else "ranks {} differ"
    return f"{verb.format(_names(others))} from rank{'s' * (len(agree) > 1)} {_names(agree)}"


def _more(groups: list[list[int]]) -> str:
    more = len(groups) - 1
    return f" (and {more} more group{'s' * (more > 1)})" if more else ""


def _names(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))
