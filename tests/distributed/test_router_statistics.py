"""Statistics and losses of the routers on several ranks, against a literal recount and loop in one process."""

import dataclasses

import pytest
import torch

from tests.distributed.equality_cases import ROUTER_LOSSES, SUITES
from tests.distributed.one_process import (
    TOLERANCE,
    assert_equals_one_process,
    expected_of,
    relative,
)
from tests.distributed.suites import suite_trainer

pytestmark = pytest.mark.distributed
RANKS = {"router": 2, "router-tp2dp2": 4}
MARKS = {"router": pytest.mark.slow, "router-tp2dp2": pytest.mark.exhaustive}
RUNS = [
    pytest.param(suite, case, id=f"{suite}-{case.name}", marks=MARKS[suite])
    for suite in RANKS
    for case in SUITES[suite]
]


@pytest.fixture(scope="module")
def trained(models, tmp_path_factory, extensions):
    return suite_trainer("equality_worker.py", RANKS, models, tmp_path_factory, extensions)


@pytest.mark.parametrize(("suite", "case"), RUNS)
def test_equals_one_process(suite, case, trained, models):
    assert_equals_one_process(torch.load(trained(suite) / f"{case.name}.pt"), case, str(models))


@pytest.mark.slow
@pytest.mark.parametrize("left_out", ROUTER_LOSSES)
def test_every_loss_matters(left_out, models):
    """Without it the training ends far from where the equality would allow."""
    case = SUITES["router"][0]
    rest = tuple(name for name in ROUTER_LOSSES if name != left_out)
    everything, others = (
        expected_of(dataclasses.replace(case, router_losses=losses), str(models))["weights"]
        for losses in (tuple(ROUTER_LOSSES), rest)
    )
    for part in ("comol_A", "comol_cores", "comol_router"):
        moved = max(relative(others[name], weight) for name, weight in everything.items() if name.endswith(part))
        assert moved > 20 * TOLERANCE
