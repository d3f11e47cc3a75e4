"""Router statistics of a tiny PEFT model against a literal recount in float64."""

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM

from comol_ds.adapters.routing import Gates
from comol_ds.config import AdapterSettings, ModelSettings, RouterSettings
from comol_ds.data.collate import packed_batch
from comol_ds.layout import RankGrid
from comol_ds.parallel.activations import prepare_activations
from comol_ds.parallel.assemble import attach_adapter
from comol_ds.parallel.mesh import Mesh
from comol_ds.router_load.counting import VALIDATION, mean_cosine
from comol_ds.training.router_load import RouterLoad, routed_tokens, valid_tokens
from comol_ds.training.step import model_inputs
from tests.router_recount import Recount, assert_same_statistics
from tests.tiny_models import FAMILIES, left_padded, make_adapter_act, random_batch

TARGETS = ["q_proj", "down_proj"]
LAYERS = [f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.q_proj", "mlp.down_proj")]
TASKS = ["even", "odd"]
CPU = torch.device("cpu")
CLOSE = 2e-6  # fp32 gates against float64


def build(router: str = "core", checkpointing: str = "none", experts: int = 3):
    """A tiny model whose routers prefer some experts and whose updates are not zero."""
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_config(FAMILIES["llama"])
    settings = AdapterSettings(r=4, num_experts=experts, router=router, target_modules=TARGETS)
    model = attach_adapter(base, settings, seed=3)
    make_adapter_act(model)
    settings = ModelSettings(activation_checkpointing=checkpointing)
    prepare_activations(model, settings, Mesh(RankGrid(0, 1)), leaf_layers=False)
    return model.train()


def right_padded() -> dict:
    return random_batch(4, seed=5)


def padded_in_front() -> dict:
    batch = left_padded(random_batch(4, seed=6))
    assert batch["attention_mask"][:, -1].all() and not batch["attention_mask"].all()
    return batch


def packed() -> dict:
    generator = torch.Generator().manual_seed(7)

    def record(length: int, task: str) -> dict:
        ids = torch.randint(3, 400, (length,), generator=generator).tolist()
        labels = [-100] * 2 + ids[2:]
        return {"input_ids": ids, "labels": labels, "record_id": str(length), "task": task}

    bins = [[record(5, "odd"), record(9, "even"), record(3, "odd")], [record(8, "even"), record(4, "odd")]]
    batch = packed_batch(bins, pad_token_id=0)
    assert valid_tokens(batch).sum() == 29 and valid_tokens(batch).numel() == 34
    return batch


def count(model, load: RouterLoad, *batches: dict, split: str = "train", detail: bool = True) -> None:
    for batch in batches:
        with load.counting(batch, CPU, split, detail):
            model(**model_inputs(batch, CPU))


def masks(*batches: dict) -> list[torch.Tensor]:
    return [valid_tokens(batch) for batch in batches]


@pytest.mark.parametrize("router", ["core", "input"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("make_batch", [right_padded, padded_in_front, packed])
def test_equals_the_recount(make_batch, checkpointing, router):
    model, batch = build(router, checkpointing), make_batch()
    load, recount = RouterLoad(model, tasks=TASKS), Recount(model)
    with load.counting(batch, CPU):
        logits = model(**model_inputs(batch, CPU)).logits
    logits.sum().backward()  # recomputes, if layers are checkpointed
    found, expected = load.pop(), recount.statistics([batch], masks(batch))
    assert_same_statistics(found, expected, CLOSE)
    assert list(found["layers"]) == LAYERS
    assert found["tokens"]["all"] == int(valid_tokens(batch).sum()) == sum(found["tokens"][task] for task in TASKS)
    shares = [tuple(layer["argmax_share"]) for layer in expected["layers"].values()]
    assert len(set(shares)) > 1 and any(0 < share < 1 for layer in shares for share in layer)  # not a trivial case
    assert all(layer["update_ratio"] > 0.01 for layer in found["layers"].values())


def test_nearly_equal_gates_keep_their_coefficient_of_variation():
    """cv is then a small difference of large sums."""
    model, batch = build(), random_batch(150, seed=8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "comol_router" in name:
                parameter.mul_(0.01)
    load, recount = RouterLoad(model, tasks=TASKS), Recount(model)
    count(model, load, batch)
    found, expected = (
        {name: layer["cv"] for name, layer in statistics["layers"].items()}
        for statistics in (load.pop(), recount.statistics([batch], masks(batch)))
    )
    assert 0 < max(expected.values()) < 1e-2
    assert found == pytest.approx(expected, rel=5e-5)


def test_padding_that_counts_is_noticed():
    model, batch = build(), right_padded()
    load, recount = RouterLoad(model, tasks=TASKS), Recount(model)
    leaking = batch | {"record_index": torch.arange(4).unsqueeze(1).expand_as(batch["record_index"])}
    count(model, load, leaking)
    found, expected = load.pop(), recount.statistics([batch], masks(batch))
    with pytest.raises(AssertionError):
        assert_same_statistics(found, expected, CLOSE)
    with pytest.raises(AssertionError):  # not the number of tokens alone
        assert_same_statistics(found | {"tokens": expected["tokens"]}, expected, CLOSE)


def test_recomputation_that_counts_is_noticed():
    """A backward inside ``counting`` adds the recomputed gates to the same number of tokens."""
    model, batch = build(checkpointing="full"), right_padded()
    load, recount = RouterLoad(model, tasks=TASKS), Recount(model)
    with load.counting(batch, CPU):
        model(**model_inputs(batch, CPU)).logits.sum().backward()
    with pytest.raises(AssertionError):
        assert_same_statistics(load.pop(), recount.statistics([batch], masks(batch)), CLOSE)


def test_recomputation_runs_the_routers_again():
    """So the test above had something to notice."""
    model, batch = build(checkpointing="full"), right_padded()
    calls = []
    for module in model.modules():
        if isinstance(module, Gates):
            module.register_forward_hook(lambda *_: calls.append(1))
    model(**model_inputs(batch, CPU)).logits.sum().backward()
    assert len(calls) == 2 * len(LAYERS)


def test_micro_batches_of_a_step_add_up_by_token():
    model, batches = build(), [right_padded(), packed(), padded_in_front()]
    load, recount = RouterLoad(model, tasks=TASKS), Recount(model)
    count(model, load, *batches)
    assert_same_statistics(load.pop(), recount.statistics(batches, masks(*batches)), CLOSE)


def test_detail_is_of_the_passes_that_asked_for_it():
    model, batches = build(), [right_padded(), packed()]
    load, recount = RouterLoad(model, tasks=TASKS), Recount(model)
    count(model, load, batches[0], detail=False)
    count(model, load, batches[1], detail=True)
    expected = recount.statistics(batches, masks(*batches), [False, True])
    assert_same_statistics(load.pop(), expected, CLOSE)
    count(model, load, batches[0], detail=False)
    values = load.pop()["layers"][LAYERS[0]]
    assert values["update_ratio"] is values["core_cosine"] is values["tasks"]["odd"]["update_ratio"] is None


@pytest.mark.parametrize("make_batch", [right_padded, packed])
def test_completion_tokens_only(make_batch):
    settings = RouterSettings(router_tokens="completion")
    model, batch = build(), make_batch()
    load, recount = RouterLoad(model, settings, TASKS), Recount(model)
    count(model, load, batch)
    chosen = routed_tokens(batch, settings)
    assert 0 < chosen.sum() < valid_tokens(batch).sum()
    assert_same_statistics(load.pop(), recount.statistics([batch], [chosen]), CLOSE)


def test_training_and_validation_are_kept_apart():
    model, batches = build(), [right_padded(), packed()]
    load, recount = RouterLoad(model, tasks=TASKS), Recount(model)
    count(model, load, batches[0])
    count(model, load, batches[1], split=VALIDATION)
    recount.passes, both = {}, recount.passes
    for which, split in ((1, VALIDATION), (0, "train")):
        recount.passes = {layer: [passes[which]] for layer, passes in both.items()}
        expected = recount.statistics([batches[which]], masks(batches[which]))
        assert_same_statistics(load.pop(split), expected, CLOSE)


def test_labels_that_were_not_declared_count_together():
    model, batch = build(), right_padded()
    load = RouterLoad(model, tasks=["even", "unseen"])
    count(model, load, batch)
    found = load.pop()
    assert set(found["tokens"]) == {"all", "even", "other"}
    assert set(found["layers"][LAYERS[0]]["tasks"]) == {"even", "other"}
    plain = RouterLoad(model)
    count(model, plain, batch)
    without = plain.pop()
    assert set(without["tokens"]) == {"all"} and without["layers"][LAYERS[0]]["tasks"] == {}


def test_what_stands_in_padding_does_not_matter():
    model, batch = build(), right_padded()
    load = RouterLoad(model, tasks=TASKS)
    with load.counting(batch, CPU):
        for layer in (module for module in model.modules() if hasattr(module, "comol_A")):
            x = torch.ones(*batch["input_ids"].shape, layer.in_features)
            x[~valid_tokens(batch)] = float("nan")
            layer(x)
    for values in load.pop()["layers"].values():
        assert sum(values["mean_gate"]) == pytest.approx(1, abs=1e-6)
        assert values["update_ratio"] > 0


def test_only_what_is_armed_counts_and_pop_starts_anew():
    model = build()
    load = RouterLoad(model)
    assert load.pop() is None
    model(**model_inputs(right_padded(), CPU))
    assert load.pop() is None
    count(model, load, packed())
    first = load.pop()
    assert load.pop() is None
    count(model, load, packed())
    assert load.pop() == first
    with pytest.raises(RuntimeError), load.counting(packed(), CPU):
        raise RuntimeError
    load.pop()
    model(**model_inputs(right_padded(), CPU))  # disarmed by the error
    assert load.pop() is None
    load.close()
    count(model, load, packed())
    assert load.pop() is None


def test_switched_off_it_counts_nothing():
    model = build()
    load = RouterLoad(model, RouterSettings(router_load=False))
    count(model, load, packed())
    assert load.pop() is None
    assert not any(module._forward_hooks for module in model.modules() if isinstance(module, Gates))


def test_memory_does_not_grow_with_tokens():
    model = build()
    load = RouterLoad(model, tasks=TASKS)
    groups, experts = 4, 3  # all, two tasks, the rest
    per_layer = groups * (3 * experts + 2) + groups * 2 + 2
    for rows in (4, 16):
        count(model, load, random_batch(rows, seed=rows))
        sums = load._counts._splits["train"]
        assert sums.flat.numel() == len(LAYERS) * per_layer


def test_a_layer_that_sees_other_tokens_is_named():
    model, batch = build(), right_padded()
    load = RouterLoad(model)
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn.q_proj was called with 48 tokens while 96 were"):
        count(model, load, batch | {"input_ids": batch["input_ids"][:2], "attention_mask": batch["attention_mask"][:2]})


def test_another_adapter_is_not_counted():
    model, batch = build(), right_padded()
    load = RouterLoad(model, tasks=TASKS)
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    count(model, load, batch)
    assert load.pop() is None


def test_passes_without_the_adapter_do_not_dilute():
    """A reference model for preference optimization is the same model with its adapters disabled."""
    model, batches = build(), [right_padded(), packed()]
    load, recount = RouterLoad(model, tasks=TASKS), Recount(model)
    count(model, load, batches[0])
    with model.disable_adapter():
        count(model, load, batches[1])
    assert_same_statistics(load.pop(), recount.statistics(batches[:1], masks(batches[0])), CLOSE)


@pytest.mark.parametrize("experts", [1, 2, 5])
def test_mean_cosine_over_pairs(experts):
    cores = torch.randn(experts, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pairs = list(itertools.combinations(cores.flatten(1), 2))
    literal = sum(torch.cosine_similarity(a, b, dim=0).item() for a, b in pairs) / max(len(pairs), 1)
    assert mean_cosine(cores).item() == pytest.approx(literal, abs=1e-12)
