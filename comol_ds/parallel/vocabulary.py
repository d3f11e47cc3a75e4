"""Embedding and output head split over the vocabulary, and the loss on logits of which no rank holds more than V/K.

Glossary: B batch, T sequence, V vocabulary, K tensor-parallel ranks, N tokens. Shards may differ by one row when K does
not divide V.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from comol_ds.adapters.comol_layer import CoMoLLinear
from comol_ds.parallel.collectives import join_slices, sum_over_tensor_parallel
from comol_ds.parallel.cross_entropy import cross_entropy
from comol_ds.parallel.mesh import Mesh
from comol_ds.parallel.tp_layers import shard_parameter


class Vocabulary:
    """How the logits of the output head are spread: what the loss and generation need to know.

    Args:
        mesh: None where the logits are whole.
        size: V.
    """

    def __init__(self, mesh: Mesh | None = None, size: int = 0) -> None:
        self._mesh, self._size = mesh, size
        self._gathers = False
        self._positions: torch.Tensor | None = None

    def watch_head(self, head: nn.Module) -> None:
        """Let `only` choose what the model's output head, with whatever is around it, computes logits of."""
        if isinstance(head, CoMoLLinear):  # its router's statistics are of all tokens
            head.register_forward_hook(lambda module, args, logits: self._select(logits))
        else:  # before the input is shared over the ranks, so that backward sums the chosen positions only
            head.register_forward_pre_hook(lambda module, args: (self._select(args[0]),), prepend=True)

    @contextmanager
    def only(self, positions: torch.Tensor) -> Iterator[None]:
        """Inside, the model returns logits [1, n, V] of ``positions`` alone, [n] numbers below B*T, on the device."""
        self._positions = positions
        try:
            yield
        finally:
            self._positions = None

    def _select(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, ...] -> [1, n, ...] inside `only`."""
        return x if self._positions is None else x.flatten(0, 1).index_select(0, self._positions).unsqueeze(0)

    def cross_entropy(self, logits: torch.Tensor, targets: torch.Tensor, ignored: int) -> torch.Tensor:
        """Cross-entropy per token in fp32, 0 where the target is ``ignored``, NaN where it is no id.

        Backward writes the gradient over the logits if autograd computed them.

        Args:
            logits: [N, V], or this rank's [N, V/K], any float type.
            targets: [N], ids in the whole vocabulary or ``ignored``; alike on all tensor-parallel ranks.

        Returns:
            [N], alike on all tensor-parallel ranks.
        """
        if self._mesh is None:
            return cross_entropy(logits, targets, ignored)
        first = self._mesh.shard(self._size, dim=1).start
        return cross_entropy(logits, targets, ignored, first, self._size, self._mesh.tensor_group)

    @contextmanager
    def whole_logits(self) -> Iterator[None]:
        """Inside, the head returns [..., V] on every rank; for generation, which needs the last position's only."""
        self._gathers = True
        try:
            yield
        finally:
            self._gathers = False

    def after_head(self, module: nn.Module, args: Sequence[Any], logits: torch.Tensor) -> torch.Tensor:
        """Forward hook of the head: nothing, or [..., V/K] -> [..., V] inside `whole_logits`."""
        if not self._gathers:
            return logits
        shard = self._mesh.shard(self._size, dim=logits.dim() - 1)
        return join_slices(logits, shard, (*logits.shape[:-1], self._size), self._mesh.tensor_group)


class VocabularyLookup:
    """Makes an nn.Embedding of any subclass vocabulary-parallel, by a hook before and one after its own forward.

    Foreign ids look up row 0 and are zeroed, so that the sum over the ranks has one term per token.
    """

    def __init__(self, embedding: nn.Embedding, mesh: Mesh) -> None:
        self.shard = mesh.shard(embedding.num_embeddings, dim=0)
        self.group = mesh.tensor_group
        self._foreign: torch.Tensor | None = None
        embedding.weight = shard_parameter(embedding.weight, self.shard)
        embedding.num_embeddings = self.shard.size
        embedding.padding_idx = None  # an id of the whole vocabulary; it matters to the gradient of a trained one only
        embedding.register_forward_pre_hook(self._before)
        embedding.register_forward_hook(self._after)

    def _before(self, module: nn.Module, args: Sequence[Any]) -> tuple[torch.Tensor]:
        (ids,) = args  # [...]
        self._foreign = (ids < self.shard.start) | (ids >= self.shard.stop)
        return ((ids - self.shard.start).masked_fill(self._foreign, 0),)

    def _after(self, module: nn.Module, args: Sequence[Any], rows: torch.Tensor) -> torch.Tensor:
        own = rows.masked_fill(self._foreign.unsqueeze(-1), 0)
        self._foreign = None
        return sum_over_tensor_parallel(own, self.group)
