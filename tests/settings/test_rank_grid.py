"""The world of data-parallel x tensor-parallel ranks, the groups in it, and the parts of a tensor."""

import itertools

import pytest

from comol_ds.errors import UserError
from comol_ds.layout import RankGrid, Shard, either, plan_grid, shard_of

GRIDS = [(size, k) for size in (1, 2, 3, 4, 6, 8, 12) for k in range(1, size + 1) if size % k == 0]


def test_tensor_parallel_peers_are_neighbours_and_data_parallel_peers_a_stride_apart():
    grid = RankGrid(rank=5, size=8, tensor_parallel=2)
    assert (grid.tp_rank, grid.dp_rank, grid.data_parallel) == (1, 2, 4)
    assert grid.tensor_groups() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert grid.data_groups() == [[0, 2, 4, 6], [1, 3, 5, 7]]


@pytest.mark.parametrize(("size", "tensor_parallel"), GRIDS)
def test_every_rank_finds_itself_in_the_groups(size, tensor_parallel):
    for rank in range(size):
        grid = RankGrid(rank, size, tensor_parallel)
        assert grid.data_parallel * tensor_parallel == size
        assert grid.tensor_groups()[grid.dp_rank][grid.tp_rank] == rank
        assert grid.data_groups()[grid.tp_rank][grid.dp_rank] == rank
        for groups in (grid.tensor_groups(), grid.data_groups()):
            assert sorted(itertools.chain(*groups)) == list(range(size))


def test_without_tensor_parallelism_every_rank_is_alone_with_its_model():
    grid = RankGrid(rank=2, size=3)
    assert (grid.tp_rank, grid.dp_rank, grid.data_parallel) == (0, 2, 3)
    assert grid.tensor_groups() == [[0], [1], [2]] and grid.data_groups() == [[0, 1, 2]]


@pytest.mark.parametrize(("total", "parts"), itertools.product((1, 2, 7, 32, 401), (1, 2, 3, 4)))
def test_shards_cover_a_dimension_once_and_differ_by_one_at_most(total, parts):
    shards = [shard_of(total, 1, parts, index) for index in range(parts)]
    assert [i for shard in shards for i in range(shard.start, shard.stop)] == list(range(total))
    sizes = [shard.stop - shard.start for shard in shards]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1
    assert {shard.dim for shard in shards} == {1}


def test_the_first_shards_are_the_longer_ones():
    assert [shard_of(7, 0, 3, index) for index in range(3)] == [Shard(0, 0, 3), Shard(0, 3, 5), Shard(0, 5, 7)]


@pytest.mark.parametrize(
    ("size", "tensor_parallel", "local_size", "allow_cross_node"),
    [(1, 1, 1, False), (4, 4, 4, False), (8, 2, 4, False), (8, 8, 4, True), (6, 2, 3, True), (3, 1, 2, False)],
)
def test_worlds_that_can_be_divided(size, tensor_parallel, local_size, allow_cross_node):
    grid = plan_grid(size - 1, size, tensor_parallel, local_size, allow_cross_node)
    assert grid == RankGrid(size - 1, size, tensor_parallel)


LINKS = "or accept the slower links between nodes with --allow_cross_node_tp"


@pytest.mark.parametrize(
    ("size", "tensor_parallel", "local_size", "allow_cross_node", "message"),
    [
        (1, 2, 1, False, "2 does not divide the world of 1 ranks; use 1, or start a multiple of 2 ranks"),
        (8, 3, 8, False, "3 does not divide the world of 8 ranks; use 1, 2, 4 or 8, or start a multiple of 3 ranks"),
        (8, 3, 2, False, "3 does not divide the world of 8 ranks; use 1 or 2, or start a multiple of 3 ranks"),
        (8, 3, 2, True, "3 does not divide the world of 8 ranks; use 1, 2, 4 or 8, or start a multiple of 3 ranks"),
        (8, 8, 4, False, f"8 is more than the 4 ranks of a node; use 1, 2 or 4, {LINKS}"),
        (6, 2, 3, False, f"2 does not divide the 3 ranks of a node, so a group would lie on two; use 1 or 3, {LINKS}"),
    ],
)
def test_worlds_that_cannot(size, tensor_parallel, local_size, allow_cross_node, message):
    with pytest.raises(UserError) as error:
        plan_grid(0, size, tensor_parallel, local_size, allow_cross_node)
    assert str(error.value) == f"--tensor_parallel_size {message}"


def test_a_choice_in_words():
    assert [either([1]), either([1, 2]), either([1, 2, 4])] == ["1", "1 or 2", "1, 2 or 4"]
