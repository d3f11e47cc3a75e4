"""The numbers behind the report's pictures, against loops that follow the definitions."""

import math

import numpy as np
import pytest

from comol_ds.report import values
from comol_ds.report.modules import group_layers, shorten
from tests.report.synthetic import layer_names

TASKS, LAYERS, EXPERTS = 3, 4, 5


@pytest.fixture
def gates() -> np.ndarray:
    return np.random.default_rng(0).dirichlet(np.full(EXPERTS, 0.5), size=(TASKS, LAYERS))


TOKENS = np.array([100.0, 250.0, 30.0])


def test_mutual_information_is_the_sum_over_the_joint_distribution(gates):
    found = values.mutual_information(TOKENS, gates)
    for layer in range(LAYERS):
        wanted = 0.0
        for task in range(TASKS):
            for expert in range(EXPERTS):
                joint = TOKENS[task] / TOKENS.sum() * gates[task, layer, expert]
                p_expert = sum(TOKENS[t] / TOKENS.sum() * gates[t, layer, expert] for t in range(TASKS))
                wanted += joint * math.log2(joint / (p_expert * TOKENS[task] / TOKENS.sum()))
        assert found[layer] == pytest.approx(wanted, abs=1e-12)


def test_tasks_that_route_alike_share_no_information(gates):
    alike = np.repeat(gates[:1], TASKS, axis=0)
    assert values.mutual_information(TOKENS, alike) == pytest.approx(np.zeros(LAYERS), abs=1e-12)


def test_an_expert_per_task_tells_all_about_the_task():
    separated = np.eye(EXPERTS)[:TASKS, None]  # T, 1, E
    entropy = -sum(n / 380 * math.log2(n / 380) for n in (100, 250, 30))
    assert values.mutual_information(TOKENS, separated) == pytest.approx([entropy], abs=1e-12)
    assert values.information_limit(TOKENS, EXPERTS) == pytest.approx(entropy, abs=1e-12)


def test_two_experts_tell_one_bit_at_most():
    even = np.full(4, 100.0)
    assert values.information_limit(even, 2) == 1.0
    separated = np.array([[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]], [[0.0, 1.0]]])
    assert values.mutual_information(even, separated) == pytest.approx([1.0])


def test_information_is_unknown_where_a_gate_is(gates):
    gates[1, 2] = np.nan
    assert np.isnan(values.mutual_information(TOKENS, gates)).tolist() == [False, False, True, False]


def test_distances_are_half_the_absolute_differences_averaged_over_layers(gates):
    found = values.task_distances(gates)
    for t in range(TASKS):
        for u in range(TASKS):
            differences = [sum(abs(gates[t, layer] - gates[u, layer])) / 2 for layer in range(LAYERS)]
            assert found[t, u] == pytest.approx(sum(differences) / LAYERS, abs=1e-12)


def test_distances_leave_out_layers_that_are_unknown(gates):
    wanted = values.task_distances(gates[:, :2])
    gates[0, 2:] = np.nan
    assert values.task_distances(gates)[0, 1] == pytest.approx(wanted[0, 1])


def test_preferences_cancel_over_the_tokens_of_a_layer(gates):
    found = values.preference(TOKENS, gates)
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            mean = sum(TOKENS[t] * gates[t, layer, expert] for t in range(TASKS)) / TOKENS.sum()
            assert found[1, layer, expert] == pytest.approx((gates[1, layer, expert] - mean) * EXPERTS)
    assert np.einsum("t,tle->le", TOKENS, found) == pytest.approx(np.zeros((LAYERS, EXPERTS)), abs=1e-9)


@pytest.mark.parametrize(
    ("count", "wanted", "positions"), [(1, 5, [0]), (3, 5, [0, 1, 2]), (9, 5, [0, 2, 4, 6, 8]), (100, 2, [0, 99])]
)
def test_positions_are_spread_with_both_ends(count, wanted, positions):
    assert values.evenly_spaced(count, wanted) == positions


def test_layers_are_grouped_by_kind_in_order_of_depth():
    groups = group_layers(layer_names(12, 2)[::-1])
    assert [group.title for group in groups] == ["k_proj", "q_proj"]
    assert groups[1].depths == tuple(range(12))
    assert groups[1].rows == tuple(range(23, 0, -2))


def test_kinds_with_the_same_end_are_told_apart_by_more_of_the_path():
    groups = group_layers(["vision.blocks.0.attn.q_proj", "text.layers.0.attn.q_proj", "text.layers.0.attn.k_proj"])
    assert [group.title for group in groups] == ["blocks.*.attn.q_proj", "layers.*.attn.q_proj", "k_proj"]


def test_the_first_number_of_a_path_is_the_layer():
    [group] = group_layers(["encoder.block.3.layer.1.wo", "encoder.block.1.layer.1.wo"])
    assert (group.title, group.depths, group.rows, group.labels) == ("wo", (1, 3), (1, 0), ("1", "3"))


def test_names_without_a_number_come_last_with_a_row_each():
    groups = group_layers(["lm_head", "model.layers.0.q_proj", "score", "h2.proj"])
    assert [(group.title, group.labels, group.depths) for group in groups] == [
        ("q_proj", ("0",), (0,)),
        ("no layer index", ("lm_head", "score", "h2.proj"), None),
    ]


def test_long_names_lose_their_middle():
    assert shorten("model.layers.12.self_attn.q_proj", 12) == "mod…n.q_proj"
    assert shorten("q_proj", 12) == "q_proj"
