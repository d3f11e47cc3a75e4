"""Every file of ds_configs/ has an equality gate; here are those that need ranks or processes of their own."""

import pytest
import torch

from tests.distributed.equality_cases import SUITES
from tests.distributed.launching import REPOSITORY
from tests.distributed.one_process import assert_equals_one_process
from tests.distributed.suites import suite_trainer

RANKS = {"tp8": 8, "70b_multinode": 2}
MARKS = {"tp8": pytest.mark.exhaustive, "70b_multinode": pytest.mark.slow}  # eight ranks take minutes on two cores
RUNS = [pytest.param(suite, case, id=suite, marks=MARKS[suite]) for suite in RANKS for case in SUITES[suite]]


@pytest.fixture(scope="module")
def trained(models, tmp_path_factory, extensions):
    return suite_trainer("equality_worker.py", RANKS, models, tmp_path_factory, extensions)


@pytest.mark.distributed
@pytest.mark.parametrize(("suite", "case"), RUNS)
def test_equals_one_process(suite, case, trained, models):
    assert_equals_one_process(torch.load(trained(suite) / f"{case.name}.pt"), case, str(models))


def test_every_file_is_in_a_suite():
    gated = {case.ds_config for cases in SUITES.values() for case in cases}
    assert {path.stem for path in (REPOSITORY / "ds_configs").glob("*.json")} == gated
