"""What the passes keep and need, counted on one row of T tokens by letting the model's own code run without memory.

Everything that is counted is proportional to the rows of a micro-batch. Of decoder layers that are equal the first and
another one run, which stands for all that follow.

Glossary: B batch, T sequence, H hidden size, L layers, V vocabulary, K tensor-parallel ranks.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from comol_ds.config import ModelSettings
from comol_ds.errors import UserError, one_line
from comol_ds.parallel.activations import prepare_activations
from comol_ds.planner.counting import LiveBytes, SavedBytes, address
from comol_ds.planner.dry_forward import without_memory
from comol_ds.planner.local_model import LocalModel
from comol_ds.planner.request import Request


@dataclass
class Part:
    """What one decoder layer, or all that is outside the layers, takes per row. Bytes.

    Attributes:
        saved: each storage that stays between forward and backward.
        saved_views: each view of them that an operation saved.
        working: further memory while its backward pass runs, recomputation included; outside the layers: while head and
            loss run, forward and backward.
        left: of the parts outside the layers: what stays alive while the layers' backward passes run.
        forward_sums, backward_sums: tensor-parallel all-reduces of either pass, bytes of each tensor.
    """

    saved: list[int] = field(default_factory=list)
    saved_views: list[int] = field(default_factory=list)
    working: int = 0
    left: int = 0
    forward_sums: list[int] = field(default_factory=list)
    backward_sums: list[int] = field(default_factory=list)

    @property
    def kept(self) -> int:
        return sum(self.saved)


@dataclass(frozen=True)
class Passes:
    """A forward and a backward pass over one row.

    Attributes:
        layers: in forward order.
        ends: embedding, final norm, head and loss.
        shared: bytes that all layers read: masks, position tables.
        entered: names of the modules outside the layers and of the layers, in the order of their forward passes.
        finished: those with weights, in the order in which their forward passes ended; backward goes the other way.
    """

    layers: list[Part]
    ends: Part
    shared: int
    entered: list[str]
    finished: list[str]


@dataclass(frozen=True)
class Profile:
    """The same passes with every decoder layer keeping what autograd saves, and with every one keeping its input."""

    plain: Passes
    recomputed: Passes

    def parts(self, checkpointed_every: int) -> list[Part]:
        """Layer by layer under --activation_checkpointing: 0 none, 1 full, N selective:N."""
        pairs = zip(self.plain.layers, self.recomputed.layers, strict=True)
        return [
            recomputed if checkpointed_every and index % checkpointed_every == 0 else plain
            for index, (plain, recomputed) in enumerate(pairs)
        ]


def profile(request: Request, local: LocalModel, kinds: dict[str, str]) -> Profile:
    """Run the model both ways.

    Args:
        request: the resolved run.
        local: its model, with its first layers only, if the last of a kind stands for those that are missing. It serves
            nothing else afterwards.
        kinds: name -> kind of every decoder layer of the whole model.

    Raises:
        UserError: the model's forward pass depends on values (a router of experts) and cannot run without them.
    """
    try:
        with without_memory(local.model, request):
            plain = recomputed = _run(request, local)
            if local.layers:
                full = ModelSettings(activation_checkpointing="full")
                prepare_activations(local.model, full, local.mesh, leaf_layers=False)
                recomputed = _run(request, local)
    except RuntimeError as error:
        reason = one_line(error, limit=200)
        raise UserError(
            f"--model_name_or_path {request.config.model.model_name_or_path}: the activations of"
            f" {type(local.model.get_base_model()).__name__} cannot be planned, its forward pass cannot run without"
            f" values: {reason}"
        ) from error
    return Profile(_lengthen(plain, kinds), _lengthen(recomputed, kinds))


def _lengthen(passes: Passes, kinds: dict[str, str]) -> Passes:
    """The passes through all layers from those through the first ones."""
    names, number = list(kinds), len(passes.layers)
    if number == len(names):
        return passes
    of_kind = dict(zip(kinds.values(), passes.layers, strict=False))  # the last one of each kind that ran
    missing, last_run = names[number:], names[number - 1]

    def with_missing(called: list[str]) -> list[str]:
        place = called.index(last_run) + 1
        return called[:place] + missing + called[place:]

    return replace(
        passes,
        layers=passes.layers + [of_kind[kinds[name]] for name in missing],
        entered=with_missing(passes.entered),
        finished=with_missing(passes.finished),
    )


def _run(request: Request, local: LocalModel) -> Passes:
    watch = _Watch(local)
    with watch.watching(local), watch.live:
        with watch.saved:
            loss = _loss(request.config.data.max_length, local)
        watch.saved.release()
        watch.begin_backward()
        loss.backward()
        watch.end()
    local.model.zero_grad()
    return Passes(watch.layers, watch.ends, watch.shared, watch.entered, watch.finished)


def _loss(tokens: int, local: LocalModel) -> torch.Tensor:
    """As a training step computes it, of a row in which every position has a label."""
    ids, positions = torch.empty(1, tokens, dtype=torch.long), torch.empty(tokens, dtype=torch.long)
    with local.vocabulary.only(positions):
        logits = local.model(input_ids=ids, attention_mask=torch.empty_like(ids), use_cache=False).logits  # [1, T, V/K]
    return local.vocabulary.cross_entropy(logits.squeeze(0), positions, ignored=-1).sum()


class _Watch:
    """Attributes what is counted to the part that runs: hooks tell when a layer's passes begin and end.

    A layer's backward pass begins when the gradient of its output is there, and ends where that of its input is.
    """

    def __init__(self, local: LocalModel) -> None:
        model = local.model
        own = [*model.parameters(), *model.buffers()]
        self.saved, self.live = SavedBytes(own), LiveBytes(own)
        self.layers, self.ends, self.shared = [Part() for _ in local.layers], Part(), 0
        self.entered: list[str] = []
        self.finished: list[str] = []
        self._sums: list[int] = [] if local.mesh.tensor_group is None else local.mesh.tensor_group.sent
        self._sums.clear()
        self._running, self._in_backward = self.ends, False
        self._alive_before = self._saved_before = self._views_before = 0
        self._behind_layers = 0  # alive when the last layer's forward pass was done

    @contextmanager
    def watching(self, local: LocalModel) -> Iterator[None]:
        """Inside, calls of modules outside the layers and of layers are noted, and the layers' passes told apart."""
        modules = dict(local.model.named_modules())
        handles = []
        for name in local.units:
            handles.append(modules[name].register_forward_pre_hook(_note(self.entered, name)))
            if local.units[name].within:  # without weights it passes on no gradient
                handles.append(modules[name].register_forward_hook(_note(self.finished, name)))
        for module, part in zip(local.layers.values(), self.layers, strict=True):
            handles.append(module.register_forward_pre_hook(self._before(part), with_kwargs=True))
            handles.append(module.register_forward_hook(self._after(part)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def begin_backward(self) -> None:
        self._turn_to(self.ends)
        self._in_backward = True

    def end(self) -> None:
        self._turn_to(self.ends)

    def _before(self, part: Part) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self._turn_to(part)
            beside = {address(tensor): tensor for tensor in tree_leaves(kwargs) if isinstance(tensor, torch.Tensor)}
            self.shared = max(self.shared, sum(tensor.untyped_storage().nbytes() for tensor in beside.values()))

        return hook

    def _after(self, part: Part) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            self._turn_to(self.ends)
            self._behind_layers = self.live.now
            hidden = output[0] if isinstance(output, tuple) else output  # [1, T, H]
            if hidden.requires_grad:
                hidden.register_hook(lambda gradient: self._turn_to(part))

        return hook

    def _turn_to(self, part: Part) -> None:
        """Account to the running part for what happened since the last turn; ``part`` runs from here on."""
        running = self._running
        (running.backward_sums if self._in_backward else running.forward_sums).extend(self._sums)
        self._sums.clear()
        running.saved += self.saved.storages[self._saved_before :]
        running.saved_views += self.saved.views[self._views_before :]
        if running is not self.ends and self._in_backward:
            running.working = self.live.highest - self._alive_before
        elif running is self.ends and (self._behind_layers or not self.layers):
            running.working = max(running.working, self.live.highest - self._behind_layers)
            running.left = max(0, self.live.now - self._behind_layers)
        self._running = part
        self._saved_before, self._views_before = len(self.saved.storages), len(self.saved.views)
        self._alive_before = self.live.restart()


def _note(names: list[str], name: str) -> Callable[..., None]:
    return lambda *_: names.append(name)
