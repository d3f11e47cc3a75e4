"""Router statistics of a tiny PEFT model against a literal recount, token by token, in float64."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from comol_ds.adapters.comol_layer import CoMoLLinear
from comol_ds.adapters.routing import Gates
from comol_ds.config import AdapterSettings, ModelSettings
from comol_ds.data.collate import packed_batch
from comol_ds.layout import RankGrid
from comol_ds.parallel.activations import prepare_activations
from comol_ds.parallel.assemble import attach_adapter
from comol_ds.parallel.mesh import Mesh
from comol_ds.parallel.vocabulary import Vocabulary
from comol_ds.training.loss import token_losses
from comol_ds.training.router_load import RouterLoad
from comol_ds.training.step import model_inputs, valid_tokens
from tests.tiny_models import FAMILIES, random_batch

TARGETS = ["q_proj", "down_proj"]
LAYERS = [f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.q_proj", "mlp.down_proj")]
EXPERTS = 3
CPU = torch.device("cpu")


def build(router: str = "core", checkpointing: str = "none"):
    """A tiny model whose routers prefer some experts."""
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_config(FAMILIES["llama"])
    settings = AdapterSettings(r=4, num_experts=EXPERTS, router=router, target_modules=TARGETS)
    model = attach_adapter(base, settings, seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "comol_router" in name:
                parameter.mul_(20)
    settings = ModelSettings(activation_checkpointing=checkpointing)
    prepare_activations(model, settings, Mesh(RankGrid(0, 1)), leaf_layers=False)
    return model.train()


class LayerInputs:
    """Every input of every adapted Linear, whoever calls it, in order."""

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self.seen: dict[str, list[torch.Tensor]] = {}
        for name, module in model.named_modules():
            if isinstance(module, CoMoLLinear):
                module.register_forward_pre_hook(self._keep(name.removeprefix("base_model.model.")))

    def _keep(self, name: str):
        return lambda module, args: self.seen.setdefault(name, []).append(args[0].detach().double())

    def recount(self, masks: list[torch.Tensor]) -> dict[str, dict[str, list[float]]]:
        """Mean gate and argmax share over the tokens that `masks` (one per forward, [B, T]) call valid."""
        modules = {name.removeprefix("base_model.model."): module for name, module in self.model.named_modules()}
        return {name: self._recount(modules[name], inputs[: len(masks)], masks) for name, inputs in self.seen.items()}

    @staticmethod
    def _recount(layer: CoMoLLinear, inputs: list[torch.Tensor], masks: list[torch.Tensor]) -> dict[str, list[float]]:
        down, router = layer.comol_A["default"].detach().double(), layer.comol_router["default"].detach().double()
        gate_sums, wins, tokens = [0.0] * EXPERTS, [0] * EXPERTS, 0
        for x, mask in zip(inputs, masks, strict=True):
            for b in range(mask.shape[0]):
                for t in range(mask.shape[1]):
                    if not mask[b, t]:
                        continue
                    features = x[b, t] if layer.router["default"] == "input" else down @ x[b, t]
                    weights = [math.exp(logit) for logit in (router @ features).tolist()]
                    gates = [weight / sum(weights) for weight in weights]
                    gate_sums = [total + gate for total, gate in zip(gate_sums, gates, strict=True)]
                    wins[gates.index(max(gates))] += 1
                    tokens += 1
        return {"mean_gate": [s / tokens for s in gate_sums], "argmax_share": [w / tokens for w in wins]}


def right_padded() -> dict:
    return random_batch(4, seed=5)


def left_padded() -> dict:
    batch = random_batch(4, seed=6)
    lengths = batch["attention_mask"].sum(1)
    for name in ("input_ids", "labels", "attention_mask"):
        rows = [row.roll(len(row) - int(length)) for row, length in zip(batch[name], lengths, strict=True)]
        batch[name] = torch.stack(rows)
    assert batch["attention_mask"][:, -1].all() and not batch["attention_mask"].all()
    return batch


def packed() -> dict:
    generator = torch.Generator().manual_seed(7)

    def record(length: int) -> dict:
        ids = torch.randint(3, 400, (length,), generator=generator).tolist()
        return {"input_ids": ids, "labels": ids, "record_id": str(length), "task": "x"}

    batch = packed_batch([[record(5), record(9), record(3)], [record(8), record(4)]], pad_token_id=0)
    assert valid_tokens(batch).sum() == 29 and valid_tokens(batch).numel() == 34
    return batch


def count(model, load: RouterLoad, *batches: dict) -> None:
    for batch in batches:
        with load.counting(valid_tokens(batch)):
            model(**model_inputs(batch, CPU))


def assert_equal(found: dict, expected: dict) -> None:
    assert list(found["layers"]) == list(expected) == LAYERS
    for layer, values in found["layers"].items():
        assert values["argmax_share"] == pytest.approx(expected[layer]["argmax_share"], abs=1e-12)
        assert values["mean_gate"] == pytest.approx(expected[layer]["mean_gate"], abs=1e-6)
        assert sum(values["argmax_share"]) == pytest.approx(1, abs=1e-12)
        assert sum(values["mean_gate"]) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("router", ["core", "input"])
@pytest.mark.parametrize("make_batch", [right_padded, left_padded, packed])
def test_equals_the_recount(make_batch, router):
    model, batch = build(router), make_batch()
    load, inputs = RouterLoad(model), LayerInputs(model)
    count(model, load, batch)
    found, expected = load.pop(), inputs.recount([valid_tokens(batch)])
    assert_equal(found, expected)
    assert found["tokens"] == int(valid_tokens(batch).sum())
    shares = [tuple(layer["argmax_share"]) for layer in expected.values()]
    assert len(set(shares)) > 1 and any(0 < share < 1 for layer in shares for share in layer)  # not a trivial case
    everywhere = inputs.recount([torch.ones_like(valid_tokens(batch))])
    assert everywhere != expected  # the padding would have been noticed


def test_micro_batches_of_a_step_add_up_by_token():
    model, batches = build(), [right_padded(), packed()]
    load, inputs = RouterLoad(model), LayerInputs(model)
    count(model, load, *batches)
    masks = [valid_tokens(batch) for batch in batches]
    found = load.pop()
    assert_equal(found, inputs.recount(masks))
    assert found["tokens"] == sum(int(mask.sum()) for mask in masks)


def test_recomputation_is_not_counted():
    model, batches = build(checkpointing="full"), [right_padded(), random_batch(4, seed=9)]
    load, inputs = RouterLoad(model), LayerInputs(model)
    gate_calls = []
    for module in model.modules():
        if isinstance(module, Gates):
            module.register_forward_hook(lambda *_: gate_calls.append(1))
    for batch in batches:
        with load.counting(valid_tokens(batch)):
            logits = model(**model_inputs(batch, CPU)).logits
        token_losses(logits, batch["labels"], Vocabulary()).sum().backward()
    assert len(gate_calls) == 2 * 2 * len(LAYERS)  # two batches, forward and recomputation
    inputs.seen = {name: seen[::2] for name, seen in inputs.seen.items()}
    found = load.pop()
    assert_equal(found, inputs.recount([valid_tokens(batch) for batch in batches]))
    assert found["tokens"] == sum(int(valid_tokens(batch).sum()) for batch in batches)


def test_only_what_is_armed_counts_and_pop_starts_anew():
    model = build()
    load, inputs = RouterLoad(model), LayerInputs(model)
    assert load.pop() is None
    model(**model_inputs(right_padded(), CPU))
    assert load.pop() is None
    inputs.seen.clear()
    count(model, load, packed())
    first = load.pop()
    assert load.pop() is None
    count(model, load, packed())
    assert load.pop() == first
    with pytest.raises(RuntimeError), load.counting(valid_tokens(packed())):
        raise RuntimeError
    model(**model_inputs(right_padded(), CPU))  # disarmed by the error
    load.close()
    load.pop()
    count(model, load, packed())
    assert load.pop() is None
