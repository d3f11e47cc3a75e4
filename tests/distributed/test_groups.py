"""Control messages between real ranks: errors reach everybody, waits end and name who is missing."""

import re
from pathlib import Path

import pytest

from tests.distributed.launching import run_deepspeed

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def printed(extensions):
    return run_deepspeed(2, Path(__file__).parent / "groups_worker.py", [], extensions, timeout=120).stdout


def test_every_rank_sees_every_value(printed):
    assert all(f"rank {rank} gathered [0, 10]" in printed for rank in (0, 1))
    assert all(f"rank {rank} counted [{2**40}, {2**40 + 1}]" in printed for rank in (0, 1))


def test_an_error_on_one_rank_is_raised_on_all(printed):
    assert all(f"rank {rank} caught UserError: bad row 7" in printed for rank in (0, 1))
    assert "rank 0 caught RuntimeError: rank 1 failed at 'prepare': disk full" in printed
    assert "rank 1 caught OSError: disk full" in printed


def test_local_rank_0_goes_first(printed):
    first, second = re.search(r"rank 0 order \[([\d.]+), ([\d.]+)\]", printed).groups()
    assert float(first) < float(second)


def test_a_missing_rank_is_named(printed):
    missed = next(line for line in printed.splitlines() if line.startswith("rank 0 missed"))
    assert "waiting for all ranks at 'the end'" in missed
    assert re.search(r"[Rr]anks? 1\b", missed)
