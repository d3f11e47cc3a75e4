"""Random states: stored and restored on one layout, derived on another."""

import random

import pytest
import torch

from comol_ds.parallel.rng import derive_rng_state, rng_state, set_rng_state


@pytest.fixture(autouse=True)
def leave_no_trace():
    state = rng_state()
    yield
    set_rng_state(state)


def draw() -> tuple[list[float], float]:
    return torch.rand(4).tolist(), random.random()


def test_a_stored_state_draws_the_same_numbers_again():
    state = rng_state()
    first = draw()
    set_rng_state(state)
    assert draw() == first


def test_a_derived_state_follows_from_seed_step_and_data_parallel_rank():
    drawn = {}
    for place in [(7, 3, 0), (7, 3, 1), (7, 4, 0), (8, 3, 0), (0, 0, 0)]:
        derive_rng_state(*place)
        drawn[place] = draw()
        derive_rng_state(*place)
        assert draw() == drawn[place]
    assert len({str(numbers) for numbers in drawn.values()}) == len(drawn)


def test_a_derived_state_does_not_repeat_the_start_of_the_run():
    torch.manual_seed(7)
    start = draw()
    derive_rng_state(7, 0, 0)
    assert draw() != start
