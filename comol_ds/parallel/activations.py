"""What the decoder layers keep between the forward and the backward pass, and where: the run's activation memory.

Three settings, which combine: --activation_checkpointing says which layers keep their input only and run again in
backward; --activation_offload moves what is kept to host memory; --partition_activations leaves each tensor-parallel
rank its part of the inputs. All take effect where transformers' decoder layers hand their forward pass to a function
of the trainer's. What lies outside the layers (final norm, logits) backward needs first, so it stays where it is.

Glossary: B batch, T sequence, H hidden size, K tensor-parallel ranks.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakValueDictionary

import deepspeed
import torch
from peft import PeftModel
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from comol_ds.config import ModelSettings
from comol_ds.errors import UserError
from comol_ds.parallel.mesh import Mesh

# Smaller tensors stay on the device: at 25 GB/s (PCIe 4.0 x16) 256 KiB take the 10 microseconds that starting a copy
# takes. Of the 1,500 MiB that a layer of Llama-3.1-70B saves for 4,096 tokens, tensors that small are 3 MiB.
MIN_OFFLOADED_BYTES = 1 << 18


def check_activations(model: PreTrainedModel, settings: ModelSettings, tensor_parallel: int) -> None:
    """Refuse what the model or the layout cannot do, before any rank waits.

    Args:
        model: the base model; its weights are not read.
        settings: the run's settings.
        tensor_parallel: K.

    Raises:
        UserError: layers that cannot be checkpointed, partitioning without tensor-parallel ranks or of inputs that K
            does not divide.
    """
    if (settings.checkpointed_every or settings.activation_offload == "cpu") and not _decoder_layers(model):
        raise UserError(
            f"--activation_checkpointing and --activation_offload: the layers of {type(model).__name__} know neither"
            " (they are no GradientCheckpointingLayer of transformers); set both to none"
        )
    if not settings.partition_activations:
        return
    if tensor_parallel == 1:
        raise UserError(
            "--partition_activations: there are no tensor-parallel ranks to divide the layers' inputs between; set"
            " --tensor_parallel_size, or drop it"
        )
    hidden = model.config.get_text_config().hidden_size
    if hidden % tensor_parallel:
        raise UserError(
            f"--partition_activations: {tensor_parallel} tensor-parallel ranks do not divide the hidden size {hidden};"
            " drop it"
        )


def prepare_activations(model: PeftModel, settings: ModelSettings, mesh: Mesh, leaf_layers: bool) -> None:
    """Set up what is kept, and one ZeRO-3 gather per decoder layer instead of one per Linear.

    Checkpointing and leaf layers need the layers' inputs to require a gradient: the base below the first adapter is
    frozen.

    Args:
        model: adapted; its decoder layers are changed in place.
        settings: the run's settings, which `check_activations` has passed.
        mesh: the ranks.
        leaf_layers: whether ZeRO-3 is to treat a decoder layer as one.
    """
    base = model.get_base_model()
    every = settings.checkpointed_every
    memory = HostMemory() if settings.activation_offload == "cpu" else nullcontext()
    recompute = _partitioned(mesh, settings) if settings.partition_activations else _recomputed(memory)
    for index, layer in enumerate(_decoder_layers(base)):
        if every and index % every == 0:
            _run_through(recompute, layer)
        elif settings.activation_offload == "cpu":
            _run_through(_kept_in(memory), layer)
    if every or leaf_layers:
        base.enable_input_require_grads()
    layers = leaf_layer_types(base)
    if leaf_layers and layers:
        deepspeed.utils.set_z3_leaf_modules(model, layers)


def leaf_layer_types(base: PreTrainedModel) -> list[type[nn.Module]]:
    """The decoder layers' classes: ZeRO-3 gathers all parameters of such a layer at once, `prepare_activations`."""
    names = set(base._no_split_modules or [])
    return list({type(module) for module in base.modules() if type(module).__name__ in names})


class HostMemory(saved_tensors_hooks):
    """Context in which what autograd saves goes to host memory, pinned beside a GPU, and comes back for backward.

    Parameters and their views stay as they are: they are no activations, and under ZeRO-3 it is the Parameter itself
    that is gathered again for backward. A tensor that several operations save is copied once. The copies run on the
    stream that computes, so they delay it, and neither pass can meet a half-written tensor.
    """

    def __init__(self) -> None:
        super().__init__(self._pack, self._unpack)
        self._copies: WeakValueDictionary[tuple, _HostCopy] = WeakValueDictionary()

    def _pack(self, tensor: torch.Tensor) -> "torch.Tensor | _HostCopy":
        if isinstance(tensor, nn.Parameter):
            return tensor
        if isinstance(tensor._base, nn.Parameter) or tensor.nbytes < MIN_OFFLOADED_BYTES:
            return tensor.detach()  # with its graph it would keep itself alive
        storage = tensor.untyped_storage()
        key = (storage._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
        found = self._copies.get(key)
        if found is None:
            found = self._copies[key] = _HostCopy(tensor)
        return found

    @staticmethod
    def _unpack(packed: "torch.Tensor | _HostCopy") -> torch.Tensor:
        return packed if isinstance(packed, torch.Tensor) else packed.values.to(packed.device, non_blocking=True)


class _HostCopy:
    """A tensor's values in host memory; lives as long as an operation that needs them in backward."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.device = tensor.device
        # so that no other storage gets its address, by which it is found, while this copy lives
        self.source = StorageWeakRef(tensor.untyped_storage())
        self.values = torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type != "cpu")
        self.values.copy_(tensor, non_blocking=True)


def _decoder_layers(base: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    return [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]


def _run_through(runner: Callable[..., Any], layer: GradientCheckpointingLayer) -> None:
    """In training the layer calls ``runner(forward, hidden_states)`` instead of its forward pass."""
    layer.gradient_checkpointing = True
    layer._gradient_checkpointing_func = runner


def _kept_in(memory: AbstractContextManager) -> Callable[..., Any]:
    def run(forward: Callable[..., Any], *args: Any) -> Any:
        with memory:
            return forward(*args)

    return run


def _recomputed(memory: AbstractContextManager) -> Callable[..., Any]:
    """Keep the positional arguments, which are the hidden states [B, T, H], in ``memory``."""

    def run(forward: Callable[..., Any], *args: Any) -> Any:
        with memory:  # torch's checkpoint saves its arguments under these hooks, and all that is inside under its own
            return checkpoint(forward, *args, use_reentrant=False)

    return run


def _partitioned(mesh: Mesh, settings: ModelSettings) -> Callable[..., Any]:
    """DeepSpeed's checkpointing: each rank of the tensor group keeps 1/K of the hidden states, backward gathers them.

    It empties the tensor that it was given, which must therefore belong to this layer alone.
    """
    deepspeed.checkpointing.configure(
        mesh, partition_activations=True, checkpoint_in_cpu=settings.activation_offload == "cpu"
    )

    def run(forward: Callable[..., Any], *args: Any) -> Any:
        if len(args) != 1:
            raise UserError(
                f"--partition_activations: the model's decoder layers take {len(args)} positional arguments, and what"
                " they share would be lost; drop it"
            )
        return deepspeed.checkpointing.checkpoint(forward, *args)

    return run
