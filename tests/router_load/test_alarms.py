import pytest

from comol_ds.router_load.statistics import as_record, dead_below
from comol_ds.training.router_alarms import RouterAlarms
from comol_ds.training.router_log import curves, heat_map


def record(step: int, **gates: list[float]) -> dict:
    layers = {
        layer: {"mean_gate": values, "dead_experts": [e for e, gate in enumerate(values) if gate < 0.01]}
        for layer, values in gates.items()
    }
    return {"step": step, "layers": layers}


EVEN, DEAD, ALONE = [0.25] * 4, [0.5, 0.004, 0.492, 0.004], [0.02, 0.94, 0.02, 0.02]


def test_a_dead_expert_is_told_once_after_enough_records():
    alarms = RouterAlarms(patience=3)
    said = [alarms.check(record(step, q=DEAD, k=EVEN)) for step in range(1, 6)]
    assert said[0] == said[1] == said[3] == said[4] == []
    assert said[2] == [
        "step 3: experts that almost no token uses (mean gate below 1 %) in 3 consecutive lines of router_load.jsonl,"
        " in q (experts 1, 3); set or raise --router_aux_loss_coef (0.01, say), or lower --num_experts"
    ]


def test_an_expert_that_comes_back_starts_the_count_anew():
    alarms = RouterAlarms(patience=2)
    said = [
        alarms.check(record(step, q=gates)) for step, gates in enumerate([DEAD, EVEN, DEAD, DEAD, EVEN, DEAD, DEAD])
    ]
    assert [bool(lines) for lines in said] == [False, False, False, True, False, False, True]


def test_collapsed_routing_is_told_with_its_layers():
    alarms = RouterAlarms(patience=2)
    layers = {f"layer_{number}": ALONE for number in range(7)}
    assert alarms.check(record(30, **layers, k=EVEN)) == []
    assert alarms.check(record(40, **layers, k=EVEN)) == [
        "step 40: routing has collapsed (one expert has more than 90 % of the mean gate) in 2 consecutive lines of"
        " router_load.jsonl, in layer_0 (expert 1),"
        " layer_1 (expert 1), layer_2 (expert 1), layer_3 (expert 1), layer_4 (expert 1) and 2"
        " more layers; set or raise --router_aux_loss_coef (0.01, say) and --router_z_loss_coef (0.001, say), or lower"
        " --learning_rate"
    ]


def test_one_expert_alone_is_no_collapse():
    assert RouterAlarms(patience=1).check(record(1, q=[1.0])) == []


@pytest.mark.parametrize(("experts", "limit"), [(2, 0.01), (50, 0.01), (64, 0.0078125), (128, 0.00390625)])
def test_an_equal_share_is_never_dead(experts, limit):
    assert dead_below(experts) == limit < 1 / experts


def test_records_hold_six_digits():
    found = as_record(
        {"tokens": {"all": 1234567}, "layers": {"q": {"mean_gate": [1 / 3, 2 / 3], "cv": None}}}, 5, "train"
    )
    assert found == {
        "version": 1,
        "step": 5,
        "split": "train",
        "tokens": {"all": 1234567},
        "layers": {"q": {"mean_gate": [0.333333, 0.666667], "cv": None}},
    }


def test_curves_and_heat_map():
    def layer(gates, entropy, update):
        return {
            "mean_gate": gates, "entropy": entropy, "effective_experts": 2.0 + entropy, "cv": 1 - entropy,
            "update_ratio": update, "core_cosine": None, "dead_experts": [1] if gates[1] < 0.01 else [],
        }  # fmt: skip

    layers = {"model.layers.0.q_proj": layer(EVEN, 1.0, 0.5), "model.layers.1.q_proj": layer(DEAD, 0.5, 0.25)}
    layers["model.layers.1.v_proj"] = layer(ALONE, 0.0, 0.0)
    assert curves(layers) == {
        "entropy": 0.5, "entropy_min": 0.0, "effective_experts": 2.5, "effective_experts_min": 2.0, "cv": 0.5,
        "cv_max": 1.0, "update_ratio": 0.25, "dead_experts": 1, "entropy/q_proj": 0.75, "entropy/v_proj": 0.0,
    }  # fmt: skip
    picture = heat_map(layers)
    assert picture.shape == (3 * 8, 4 * 8, 3) and picture.dtype == "uint8"
    cells = picture[::8, ::8].astype(int).sum(-1)
    assert len(set(cells[0])) == 1 and cells[2].argmax() == 1 and (picture[:8, :8] == picture[0, 0]).all()
