"""What each setting keeps between the passes, counted, and that the gradients do not notice."""

import gc
from collections import Counter

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from comol_ds.config import AdapterSettings, ModelSettings, ParallelSettings, RunConfig, RunSettings
from comol_ds.config_checks import check_config
from comol_ds.errors import UserError
from comol_ds.layout import RankGrid
from comol_ds.parallel import activations
from comol_ds.parallel.activations import HostMemory, check_activations, prepare_activations
from comol_ds.parallel.assemble import attach_adapter
from comol_ds.parallel.mesh import Mesh
from tests.kept_tensors import Made, MadeTensors, total_bytes
from tests.tiny_models import FAMILIES, random_batch

LAYERS = 4
CONFIG = LlamaConfig(**FAMILIES["llama"].to_dict() | {"num_hidden_layers": LAYERS})
BATCH = random_batch(3, seed=0)
B, T = BATCH["input_ids"].shape
H, V = CONFIG.hidden_size, CONFIG.vocab_size
MODES = [(checkpointing, offload) for checkpointing in ("none", "selective:2", "full") for offload in ("none", "cpu")]


@pytest.fixture(autouse=True)
def tiny_tensors_count(monkeypatch):
    monkeypatch.setattr(activations, "MIN_OFFLOADED_BYTES", 1)


def build(checkpointing: str, offload: str = "none", dropout: float = 0.0) -> PeftModel:
    """A tiny model with a moved adapter on every Linear, in training mode."""
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_config(CONFIG)
    adapter = AdapterSettings(r=4, num_experts=3, target_modules=["all-linear"], lora_dropout=dropout)
    model = attach_adapter(base, adapter, seed=3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    settings = ModelSettings(activation_checkpointing=checkpointing, activation_offload=offload)
    prepare_activations(model, settings, Mesh(RankGrid(0, 1)), leaf_layers=False)
    return model.train()


def forward(model: PeftModel) -> torch.Tensor:
    inputs = {name: BATCH[name] for name in ("input_ids", "attention_mask")}
    return model(**inputs, use_cache=False).logits


def kept(checkpointing: str, offload: str = "none") -> tuple[list[Made], int]:
    """What a forward pass leaves alive, and the bytes of it that were moved to host memory."""
    model = build(checkpointing, offload)
    with MadeTensors() as made:
        logits = forward(model)
    assert logits.requires_grad
    alive = made.alive()
    return alive, sum(item.values.nbytes for item in gc.get_objects() if type(item) is activations._HostCopy)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize(("checkpointing", "offload"), MODES[1:], ids=str)
def test_gradients_are_those_of_keeping_all(checkpointing, offload, dropout):
    def gradients(*mode: str) -> tuple[torch.Tensor, ...]:
        model = build(*mode, dropout=dropout)
        torch.manual_seed(5)
        logits = forward(model)
        torch.rand(3)  # recomputation must find the forward pass's random state
        return torch.autograd.grad(logits.square().sum(), [p for p in model.parameters() if p.requires_grad])

    torch.testing.assert_close(gradients(checkpointing, offload), gradients("none", "none"))


def test_full_keeps_one_input_per_layer():
    alive, _ = kept("full")
    inside = [(B, T, H)] * LAYERS
    # the final norm's input and its scale, the logits, and what all layers share: cos and sin, mask, positions
    outside = [(B, T, H), (B, T, 1), (B * T, V), (1, T, CONFIG.head_dim), (1, T, CONFIG.head_dim), (B, 1, T, T), (T,)]
    assert Counter(made.shape for made in alive) == Counter(inside + outside)
    assert total_bytes(alive) == 4 * ((LAYERS + 1) * B * T * H + B * T * (1 + V) + 2 * T * CONFIG.head_dim) + (
        B * T * T + 8 * T  # bool, int64
    )


def test_more_checkpointing_keeps_less():
    none, half, full = (total_bytes(kept(mode)[0]) for mode in ("none", "selective:2", "full"))
    assert full < half < none
    # every second layer of four: half of what all layers together save
    assert half - full == pytest.approx((none - full) / 2, rel=0.02)


def test_selective_checkpoints_every_nth_layer():
    def checkpointed(mode: str) -> list[bool]:
        layers = build(mode).get_base_model().model.layers
        return [layer.gradient_checkpointing for layer in layers]

    assert checkpointed("none") == [False] * LAYERS
    assert checkpointed("full") == [True] * LAYERS
    assert checkpointed("selective:2") == [True, False] * 2
    assert checkpointed("selective:3") == [True, False, False, True]
    assert checkpointed("selective:9") == [True, False, False, False]


def test_offloading_full_moves_the_layers_inputs():
    alive, moved = kept("full", "cpu")
    assert moved == LAYERS * 4 * B * T * H
    # the first input stays as well, for autograd: it is where gradients end
    assert total_bytes(alive) - moved == total_bytes(kept("full")[0]) - (LAYERS - 1) * 4 * B * T * H


@pytest.mark.parametrize("checkpointing", ["none", pytest.param("selective:2", marks=pytest.mark.slow)])
def test_offloading_moves_all_that_layers_save(checkpointing):
    alive, moved = kept(checkpointing, "cpu")
    in_full = total_bytes(kept("full", "cpu")[0]) - kept("full", "cpu")[1]
    assert total_bytes(alive) - moved <= in_full, "on the device stays what stays with full, outside the layers"
    everything = total_bytes(kept(checkpointing)[0])
    assert 0.8 * (everything - in_full) < moved < 1.05 * everything, "each saved tensor once"


def test_small_tensors_and_parameters_stay(monkeypatch):
    monkeypatch.setattr(activations, "MIN_OFFLOADED_BYTES", 1000)
    memory, weight = HostMemory(), nn.Parameter(torch.randn(50, 50))
    small, large = torch.ones(249, requires_grad=True) * 1, torch.ones(250, requires_grad=True) * 1
    assert memory._unpack(memory._pack(weight)) is weight
    assert memory._pack(weight.t()).data_ptr() == weight.data_ptr(), "no copy of a frozen weight's view"
    assert memory._pack(small).data_ptr() == small.data_ptr()
    packed = memory._pack(large)
    assert packed.values.data_ptr() != large.data_ptr()
    assert torch.equal(memory._unpack(packed), large)


def test_what_several_operations_save_is_copied_once():
    memory, x = HostMemory(), torch.randn(6, 4)
    first = memory._pack(x)
    assert memory._pack(x.view(6, 4)) is first
    assert memory._pack(x[:3]) is not first and memory._pack(x.t()) is not first
    x.add_(1)
    changed = memory._pack(x)
    assert changed is not first, "the operation before saved other values"
    assert torch.equal(memory._unpack(changed), x) and torch.equal(memory._unpack(first) + 1, x)


def test_a_new_tensor_in_a_freed_ones_place_is_not_taken_for_it():
    memory, kept_copies = HostMemory(), []
    for value in range(20):
        x = torch.full((1000,), float(value))
        kept_copies.append(memory._pack(x))
        del x
    assert [memory._unpack(copy)[0].item() for copy in kept_copies] == list(range(20))


def test_copies_keep_their_layout():
    x = torch.randn(2, 3, 4, 5).transpose(1, 2)
    found = HostMemory._unpack(HostMemory()._pack(x))
    assert torch.equal(found, x) and found.stride() == x.stride()


def test_nothing_is_kept_in_evaluation():
    model = build("full", "cpu").eval()
    with torch.no_grad(), MadeTensors() as made:
        logits = forward(model)
    assert [item.shape for item in made.alive()] == [logits.flatten(0, 1).shape]


def run_config(tensor_parallel: int | None = None, **model: object) -> RunConfig:
    return RunConfig(
        model=ModelSettings(**model),
        parallel=ParallelSettings(tensor_parallel_size=tensor_parallel),
        run=RunSettings(ds_config="ds.json"),
    )


ACCEPTED = {"none": 0, "full": 1, "selective:2": 2, "selective:10": 10}


@pytest.mark.parametrize(("text", "every"), ACCEPTED.items())
def test_accepted_forms(text, every):
    config = run_config(activation_checkpointing=text)
    check_config(config)
    assert config.model.checkpointed_every == every


@pytest.mark.parametrize(
    "text", ["", "some", "selective", "selective:", "selective:1", "selective:0", "selective:-2", "selective:02",
             "selective:2.5", "selective: 2", "Full", "full:2", "selective:2\n", "selective:٣"]
)  # fmt: skip
def test_other_forms_are_refused(text):
    with pytest.raises(UserError) as caught:
        check_config(run_config(activation_checkpointing=text))
    assert str(caught.value) == (
        f"--activation_checkpointing {text}: must be none, full, or selective:N with a whole number N of at least 2"
    )


@pytest.mark.parametrize("checkpointing", ["none", "selective:2"])
def test_partitioning_needs_full_checkpointing(checkpointing):
    with pytest.raises(UserError) as caught:
        check_config(run_config(activation_checkpointing=checkpointing, partition_activations=True))
    assert str(caught.value) == (
        f"--partition_activations with --activation_checkpointing {checkpointing}: it divides the layers' inputs, which"
        " is what full keeps; set --activation_checkpointing full"
    )


class OldStyle(nn.Module):
    """A model whose layers take no checkpointing function."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2)])


def llama() -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIG)


REFUSED = [
    (
        llama, {"activation_checkpointing": "full", "partition_activations": True}, 1,
        "--partition_activations: there are no tensor-parallel ranks to divide the layers' inputs between; set"
        " --tensor_parallel_size, or drop it",
    ),
    (
        llama, {"activation_checkpointing": "full", "partition_activations": True}, 3,
        "--partition_activations: 3 tensor-parallel ranks do not divide the hidden size 32; drop it",
    ),
    *(
        (
            OldStyle, settings, 1,
            "--activation_checkpointing and --activation_offload: the layers of OldStyle know neither (they are no"
            " GradientCheckpointingLayer of transformers); set both to none",
        )
        for settings in ({"activation_checkpointing": "selective:2"}, {"activation_offload": "cpu"})
    ),
]  # fmt: skip


@pytest.mark.parametrize(("model", "settings", "tensor_parallel", "message"), REFUSED)
def test_what_model_or_layout_cannot_do_is_refused(model, settings, tensor_parallel, message):
    with pytest.raises(UserError) as caught:
        check_activations(model(), ModelSettings(**settings), tensor_parallel)
    assert str(caught.value) == message


def test_what_they_can_do_passes():
    partitioned = ModelSettings(activation_checkpointing="full", partition_activations=True)
    assert check_activations(llama(), partitioned, 2) is None
    assert check_activations(OldStyle(), ModelSettings(), 1) is None
