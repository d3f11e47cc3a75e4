"""The plan of a run: every term of a rank's memory, and what it adds up to at the worst moment."""

from dataclasses import dataclass

from comol_ds.config import ModelSettings
from comol_ds.parallel.weight_reader import PIECE_BYTES, READERS
from comol_ds.planner.activations import Profile, profile
from comol_ds.planner.communication import Traffic, bucket_sizes, traffic
from comol_ds.planner.dry_forward import has_mask, needs_input_gradients, replaces_linear
from comol_ds.planner.gathering import Gathering, simulate
from comol_ds.planner.local_model import LocalParameter, Unit, build_local_model
from comol_ds.planner.passes import Activations, activations
from comol_ds.planner.request import Request
from comol_ds.planner.weights import Held, held_weights, step_temporaries


@dataclass(frozen=True)
class Plan:
    """One rank's memory in bytes, and its communication; rank 0, which never holds less than another.

    Attributes:
        trainable, everything: parameters of the whole model.
        local_trainable, local_everything: of this rank's tensor-parallel slice.
        held: weights, gradients and optimizer state.
        gathering: weights that ZeRO-3 has gathered at the worst moments.
        buffers: DeepSpeed's buckets for gradients.
        activations: of one micro-batch.
        other_modes: the same under other settings of --activation_checkpointing.
        step: what the update takes beside what is held.
        loading_device, loading_host: the highest while the model is built.
        traffic: what is communicated in one optimizer step.
    """

    request: Request
    trainable: int
    everything: int
    local_trainable: int
    local_everything: int
    held: Held
    gathering: Gathering
    buffers: int
    activations: Activations
    other_modes: dict[str, Activations]
    step: int
    loading_device: int
    loading_host: int
    traffic: list[Traffic]

    @property
    def always(self) -> int:
        """Weights, gradients and optimizer state on the device."""
        return self.held.on("none")

    @property
    def working(self) -> int:
        """What the passes take at the worst moment beside what is kept and gathered: tensors that backward computes
        with, or the buffers in which weights arrive."""
        return max(self.activations.working, self.gathering.arriving - self.gathering.computing)

    @property
    def passes(self) -> int:
        """What forward and backward take beside what is always there."""
        return self.buffers + self.activations.kept + self.gathering.computing + self.working

    @property
    def peak(self) -> int:
        """Device memory at the worst moment of training."""
        return self.always + max(self.passes, self.step)

    @property
    def host(self) -> int:
        """Host memory of what is offloaded, without the process itself."""
        return self.held.on("cpu") + self.activations.host

    @property
    def host_of_node(self) -> int:
        return self.host * self.request.ranks_per_node


@dataclass(frozen=True)
class _Weights:
    """A rank's weights before ZeRO, and what holds them.

    Attributes:
        layer_kinds: name -> kind of each decoder layer.
        representatives: the number of first layers that stand for all.
    """

    parameters: list[LocalParameter]
    units: dict[str, Unit]
    layer_kinds: dict[str, str]
    representatives: int
    trainable: int
    everything: int


class Planner:
    """Plans runs; what plans have in common is found out once."""

    def __init__(self) -> None:
        self._weights: dict[tuple, _Weights] = {}
        self._profiles: dict[tuple, Profile] = {}

    def plan(self, request: Request) -> Plan:
        """Plan one run.

        Raises:
            UserError: the model, or a setting with this model, is one that the run would refuse.
        """
        weights, measured, settings = self._weights_of(request), self._profile_of(request), request.config.model
        parameters = weights.parameters
        trainable = [parameter for parameter in parameters if parameter.trainable]
        held = held_weights(parameters, request)
        passes = measured.recomputed if settings.checkpointed_every else measured.plain
        trace = [weights.units[name] for name in (*passes.entered, *reversed(passes.finished))]
        gathering = simulate(trace, request)
        layers = measured.parts(settings.checkpointed_every)
        modes = (ModelSettings(activation_checkpointing=mode) for mode in ("none", "selective:2", "full"))
        loading_device, loading_host = _loading(parameters, held, request)
        return Plan(
            request,
            weights.trainable,
            weights.everything,
            sum(parameter.numel for parameter in trainable),
            sum(parameter.numel for parameter in parameters),
            held,
            gathering,
            _buffers(trainable, request),
            activations(measured, request),
            {mode.activation_checkpointing: activations(measured, request, mode) for mode in modes},
            step_temporaries(trainable, request),
            loading_device,
            loading_host,
            traffic(request, parameters, gathering.collectives, layers, passes.ends),
        )

    def floor(self, request: Request, like: Request) -> int:
        """Bytes that a rank needs at least, to see quickly that a run cannot fit.

        Weights, and half of the activations of a similar run, divided by the tensor-parallel ranks: without a mask
        attention keeps less.

        Args:
            request: the run.
            like: another layout of it, planned before.
        """
        ranks = like.grid.tensor_parallel, request.grid.tensor_parallel
        kept = activations(self._profile_of(like), request).kept * ranks[0] // ranks[1]
        return held_weights(self._weights_of(request).parameters, request).on("none") + kept // 2

    def _weights_of(self, request: Request) -> _Weights:
        key = _model_key(request)
        if key not in self._weights:
            local = build_local_model(request)
            self._weights[key] = _Weights(
                local.parameters,
                local.units,
                dict(zip(local.layers, local.layer_kinds, strict=False)),
                local.representatives,
                local.trainable,
                local.everything,
            )
        return self._weights[key]

    def _profile_of(self, request: Request) -> Profile:
        settings = request.config
        key = (
            *_model_key(request),
            settings.data.max_length,
            settings.model.attn_implementation,
            has_mask(request),
            replaces_linear(request),
            needs_input_gradients(request),
        )
        if key not in self._profiles:
            weights = self._weights_of(request)
            local = build_local_model(request, first_layers=weights.representatives)
            self._profiles[key] = profile(request, local, weights.layer_kinds)
        return self._profiles[key]


def _model_key(request: Request) -> tuple:
    """What a rank's model follows from."""
    config = request.config
    return (
        config.model.model_name_or_path,
        config.model.bf16,
        repr(config.adapter),
        config.parallel.tp_plan,
        request.grid.tensor_parallel,
    )


def _buffers(trainable: list[LocalParameter], request: Request) -> int:
    """Where gradients wait to be reduced: whole buckets of the JSON's size, however few gradients there are."""
    zero = request.zero
    if request.stage == 0 or not zero.contiguous_gradients:
        return 0
    bucket = zero.reduce_bucket_size
    if request.stage < 3:
        return bucket * request.gradient_dtype.itemsize * (2 if zero.overlap_comm else 1)
    # what a reduce-scatter is to send is laid out once more, by rank
    largest = max(bucket_sizes([parameter.numel for parameter in trainable], request), default=0)
    return (bucket + largest) * request.reduced_dtype.itemsize


def _loading(parameters: list[LocalParameter], held: Held, request: Request) -> tuple[int, int]:
    """(device, host) while the weights are read straight into place.

    Under ZeRO-3 one weight at a time exists whole before it is partitioned. The adapter is drawn on the host, whole.
    """
    whole = max(parameter.nbytes for parameter in parameters) if request.stage == 3 else 0
    drawn = sum(parameter.nbytes for parameter in parameters if parameter.trainable)
    return held.frozen["none"] + whole, held.frozen["cpu"] + drawn + READERS * PIECE_BYTES
