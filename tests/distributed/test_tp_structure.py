"""What tensor parallelism sends and holds: the collectives of the frozen base and no more, and no gathered weight."""

import json
from pathlib import Path

import pytest

from comol_ds.training.loss import count_targets
from tests.distributed.launching import run_deepspeed
from tests.tiny_models import FAMILIES, random_batch, save_attention_plan, save_tiny_model

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
LLAMA = FAMILIES["llama"]
TOKENS = random_batch(2, seed=0)["input_ids"].numel()
RANK, LAYERS, HIDDEN = 5, LLAMA.num_hidden_layers, LLAMA.hidden_size


@pytest.fixture(scope="module")
def report(tmp_path_factory, extensions):
    folder = tmp_path_factory.mktemp("structure")
    save_tiny_model(folder / "llama")
    save_attention_plan(folder)
    worker = Path(__file__).parent / "tp_structure_worker.py"
    run = run_deepspeed(4, worker, [str(folder), str(folder)], extensions)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return json.loads((folder / "report.json").read_text())


def test_forward_makes_the_collectives_of_the_frozen_base(report):
    """The embedding, then o and down of each layer; h rides along, R wide."""
    base = TOKENS * HIDDEN
    assert report["count"]["frozen"]["forward"] == [base, *[base, base] * LAYERS]
    assert report["count"]["adapted"]["forward"] == [base, *[base + TOKENS * RANK] * 2 * LAYERS]


def test_backward_makes_the_collectives_of_the_frozen_base(report):
    """The head's input, then of each layer one for gate and up, one for q, k and v; nothing for the adapters."""
    expected = [TOKENS * HIDDEN] * (1 + 2 * LAYERS)
    assert report["count"]["frozen"]["backward"] == expected
    assert report["count"]["adapted"]["backward"] == expected


def test_partial_gradients_are_summed_once_per_step(report):
    """Accumulation 3: three times the passes, then one sum for the whole model and two norms (ours, DeepSpeed's)."""
    step, partial = report["count"]["step"], report["count"]["partial"]
    per_linear = RANK * HIDDEN + 3 * RANK * RANK + 3 * RANK
    assert partial == LAYERS * 5 * per_linear
    assert step.count(partial) == 1
    assert step[step.index(partial) :] == [partial, 1, 1]


def test_no_rank_holds_logits_of_the_whole_vocabulary(report):
    logits, loss = report["count"]["adapted"]["logits"], report["count"]["adapted"]["loss"]
    assert logits[-1] == LLAMA.vocab_size // 2
    assert loss == [TOKENS, 2 * TOKENS]  # per token the maximum; then the sum of exponentials and the target's logit


def test_the_head_and_its_loss_cost_what_positions_with_a_loss_cost(report):
    """Three micro-batches of 2 records; the first layer's input, from a frozen embedding, needs no gradient."""
    labels = random_batch(12, seed=0)["labels"]
    expected = []
    for i in range(3):
        n = count_targets(labels[2 * i : 2 * i + 2])
        assert 0 < n < TOKENS
        expected += report["count"]["adapted"]["forward"]
        expected += [n, 2 * n, n * HIDDEN, *[TOKENS * HIDDEN] * (2 * LAYERS - 1)]
    assert report["count"]["step"][: len(expected)] == expected


def test_zero3_gathers_as_often_as_without_tensor_parallelism(report):
    """Forward and backward: embedding, layers, norm and head."""
    assert report["zero3"]["gathers"] == 2 * (LAYERS + 3)


def test_no_gathered_weight_is_saved_for_backward(report):
    assert report["zero3"]["views"] == []
    assert any("q_proj" in name for name in report["zero3"]["planted"]), "a transposed view would have been seen"


def test_replicated_matrices_are_spread_over_all_ranks(report):
    """Slices over the two data-parallel ranks; vectors stay with the slices that they are gathered with."""
    for name, ranks in report["groups"].items():
        assert ranks == (4 if "mlp" in name else 2), name


@pytest.mark.parametrize("losses", ["plain", "losses"])
@pytest.mark.parametrize("what", ["on", "detail"])
def test_router_statistics_add_no_collective_to_a_step(report, what, losses):
    """Accumulation 3 and recomputation."""
    step = report["routers"][losses][what]
    assert step == report["routers"][losses]["off"] and len(step) > 30


def test_router_losses_add_no_collective_to_a_step(report):
    """What they need of the other ranks rides in the sum of the losses."""
    plain, losses = ([name for name, _ in report["routers"][which]["off"]] for which in ("plain", "losses"))
    assert plain == losses


def test_router_statistics_are_read_in_one_collective(report):
    """For all layers: 4 groups of tokens (all, two tasks, the rest), 3 experts."""
    per_layer = 4 * (3 * 3 + 2) + 4 * 2 + 2
    assert report["routers"]["plain"]["pop"] == [["all_reduce", 7 * LAYERS * per_layer]]
