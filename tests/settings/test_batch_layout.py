"""Batch arithmetic: micro x accumulation x data-parallel = global."""

import itertools

import pytest

from comol_ds.errors import UserError
from comol_ds.layout import BatchLayout, plan_batches


def test_one_micro_batch_per_rank_by_default():
    layout = plan_batches(data_parallel=4, micro_batch=8, global_batch=None)
    assert layout == BatchLayout(data_parallel=4, micro_batch=8, accumulation=1)
    assert layout.global_batch == 32
    assert str(layout) == "8 micro x 1 accumulation x 4 data-parallel = 32 global"


def test_accumulation_follows_from_the_global_batch():
    for ranks, micro, accumulation in itertools.product((1, 2, 3, 8), (1, 4, 5), (1, 2, 7)):
        layout = plan_batches(ranks, micro, ranks * micro * accumulation)
        assert layout == BatchLayout(ranks, micro, accumulation)


def test_every_other_global_batch_is_refused_with_two_that_work():
    for wanted in (1, 7, 9, 12, 20, 25):
        with pytest.raises(UserError) as error:
            plan_batches(data_parallel=2, micro_batch=4, global_batch=wanted)
        message = str(error.value)
        assert f"--global_batch_size {wanted} is not a multiple of --per_device_train_batch_size 4 x 2" in message
        lower, upper = message.rsplit("use ", 1)[1].split(" or ")
        for proposed in (int(lower), int(upper)):
            assert plan_batches(2, 4, proposed).global_batch == proposed
