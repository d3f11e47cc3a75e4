"""The planner against engines on two ranks: what they hold, save and communicate, in every layout."""

import json
from pathlib import Path

import pytest

from comol_ds.planner.plan import Plan, Planner
from comol_ds.planner.request import resolve
from tests.distributed.launching import run_deepspeed
from tests.planner.layouts import RANKS, SUITES, save_model

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
TOLERANCE = 0.05
EVERY_LAYOUT = pytest.mark.parametrize(
    ("suite", "layout"),
    [
        pytest.param(suite, layout, id=layout.name, marks=[pytest.mark.slow] if suite == "more layouts" else [])
        for suite, layouts in SUITES.items()
        for layout in layouts
    ],
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def measured(model, tmp_path_factory, extensions):
    """What was counted in a layout; a suite's ranks start once, when its first layout is asked for."""
    folder, worker = tmp_path_factory.mktemp("measured"), Path(__file__).parent / "plan_worker.py"

    def read(suite: str, layout) -> dict:
        report = folder / f"{suite}.json"
        if not report.exists():
            run = run_deepspeed(RANKS, worker, [suite, model, str(folder)], extensions)
            assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
        return json.loads(report.read_text())[layout.name]

    return read


@pytest.fixture(scope="module")
def planned(model):
    plans = {}

    def plan(layout) -> Plan:
        if layout not in plans:
            request = resolve(layout.run_config(model), layout.template(), RANKS, nodes=1)
            plans[layout] = Planner().plan(request)
        return plans[layout]

    return plan


@EVERY_LAYOUT
def test_weights_and_optimizer_state_are_what_a_rank_holds(suite, layout, planned, measured):
    held, found = planned(layout).held, measured(suite, layout)
    assert held.frozen.total() == pytest.approx(found["frozen"], rel=TOLERANCE)
    assert held.adapter.total() == pytest.approx(found["adapter"], rel=TOLERANCE)
    assert held.master.total() + held.moments.total() == pytest.approx(found["optimizer"], rel=TOLERANCE)


@EVERY_LAYOUT
def test_saved_activations_are_what_autograd_saves(suite, layout, planned, measured):
    kept = planned(layout).activations
    assert kept.layers + kept.ends == pytest.approx(measured(suite, layout)["saved"], rel=TOLERANCE)


@EVERY_LAYOUT
def test_the_passes_take_no_more_than_planned_and_not_much_less(suite, layout, planned, measured):
    """Each term is planned at its worst moment, and gradients are there from the start, so the sum is too high."""
    plan = planned(layout)
    needed = plan.passes
    if plan.request.stage == 3:
        needed -= plan.buffers  # allocated with the engine
    else:
        needed += plan.held.gradients["none"]
    assert 0.95 <= needed / measured(suite, layout)["highest"] <= 1.25


@EVERY_LAYOUT
def test_collectives_are_those_that_the_ranks_make(suite, layout, planned, measured):
    plan, found = planned(layout), measured(suite, layout)["collectives"]
    by_kind = {traffic.kind: (traffic.collectives, traffic.nbytes) for traffic in plan.traffic}
    nothing = (0, 0)

    def recorded(kind: str) -> tuple[int, int]:
        return len(found[kind]), sum(found[kind])

    if layout.tensor_parallel == 1:  # over one data-parallel rank DeepSpeed calls some collectives, and others not
        updated = by_kind.get("data parallelism: updated adapter", nothing)
        gathers = by_kind.get("ZeRO-3: weights, forward and backward", nothing)
        assert recorded("gather") == tuple(map(sum, zip(updated, gathers, strict=True)))
        assert (
            recorded("scatter" if plan.request.stage == 3 else "reduce")
            == by_kind["data parallelism: adapter gradients"]
        )
    sums = [values for kind, values in by_kind.items() if kind.startswith("tensor parallelism")]
    assert len(found["tensor"]) == sum(count for count, _ in sums)
    assert sum(found["tensor"]) == pytest.approx(sum(nbytes for _, nbytes in sums), rel=TOLERANCE)
