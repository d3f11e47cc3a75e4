"""DeepSpeed's engine.compile on two ranks: it trains what one plain process does, with every adapted layer in a graph.

No graph break is inside our layers. Around them are DeepSpeed's: at stage 3 its hooks, which gather the parameters,
before and after each module that they gather; from the third step on its throughput timer before the model.
"""

import pytest
import torch

from tests.distributed.compiled_cases import COMPILED_SUITES
from tests.distributed.one_process import assert_equal_router_load, assert_equal_training, expected_of
from tests.distributed.suites import suite_trainer

pytestmark = pytest.mark.distributed
RUNS = [
    pytest.param(
        suite,
        compiled,
        id=compiled.name,
        # one launch of 28 s and two of 38 s and 67 s, nearly all of it dynamo's tracing
        marks=pytest.mark.slow if suite == "compiled" else pytest.mark.exhaustive,
    )
    for suite, cases in COMPILED_SUITES.items()
    for compiled in cases
]


@pytest.fixture(scope="module")
def trained(models, tmp_path_factory, extensions):
    ranks = dict.fromkeys(COMPILED_SUITES, 2)
    return suite_trainer("compile_worker.py", ranks, models, tmp_path_factory, extensions)


@pytest.mark.parametrize(("suite", "compiled"), RUNS)
def test_equals_one_process_and_leaves_no_layer_out(suite, compiled, trained, models):
    found = torch.load(trained(suite) / f"{compiled.name}.pt")
    assert found["uncompiled"] == [[], []]
    expected = expected_of(compiled.case, str(models))
    assert_equal_training(found, expected)
    if compiled.statistics:
        assert_equal_router_load(found, expected)
