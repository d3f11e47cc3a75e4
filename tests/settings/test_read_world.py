"""The place among the ranks, from each launcher's environment."""

import pytest

from comol_ds.errors import UserError
from comol_ds.parallel.groups import World, read_world

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
SRUN = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "77"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, World(0, 1, 0)),
        ({"WORLD_SIZE": "8"}, World(0, 1, 0)),  # left over in a shell
        (TORCHRUN, World(5, 8, 1)),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "4"}, World(5, 8, 1, 4)),
        (TORCHRUN | {"LOCAL_SIZE": "4"}, World(5, 8, 1, 4)),  # deepspeed's name
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "4", "LOCAL_SIZE": "2"}, World(5, 8, 1, 4)),  # torchrun under mpiexec
        (SRUN, World(5, 8, 1)),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_NODEID": "1"}, World(5, 8, 1, 4)),
        (SRUN | {"SLURM_TASKS_PER_NODE": "4,2(x2)", "SLURM_NODEID": "2"}, World(5, 8, 1, 2)),
        (SRUN | {"SLURM_TASKS_PER_NODE": "8"}, World(5, 8, 1, 8)),
        # the step counts, not the job
        (
            SRUN | {"SLURM_STEP_TASKS_PER_NODE": "5,3", "SLURM_TASKS_PER_NODE": "8(x9)", "SLURM_NODEID": "0"},
            World(5, 8, 1, 5),
        ),
        (TORCHRUN | {"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, World(5, 8, 1)),  # torchrun inside srun
        (SRUN | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, World(0, 1, 0)),
        ({"SLURM_PROCID": "0"}, World(0, 1, 0)),  # a shell in an allocation
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_launchers(environ, expected):
    assert read_world(environ) == expected


@pytest.mark.parametrize(
    ("environ", "missing"),
    [
        ({"RANK": "0"}, "RANK is set but WORLD_SIZE, LOCAL_RANK is not"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK is set but LOCAL_RANK is not"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, "SLURM_PROCID is set but SLURM_LOCALID is not"),
    ],
)
def test_a_part_of_a_launchers_variables(environ, missing):
    with pytest.raises(UserError) as error:
        read_world(environ)
    assert str(error.value) == f"{missing}; start with deepspeed, torchrun or srun"


def test_without_a_launchers_word_all_ranks_are_on_one_node():
    assert World(0, 6, 0).local_size == 6


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (
            TORCHRUN | {"LOCAL_SIZE": "four"},
            "LOCAL_SIZE is 'four', not a number; start with deepspeed, torchrun or srun",
        ),
        (
            SRUN | {"SLURM_TASKS_PER_NODE": "4(2x)", "SLURM_NODEID": "0"},
            "SLURM_TASKS_PER_NODE is '4(2x)' and SLURM_NODEID '0': no number of tasks; start with srun",
        ),
        (
            SRUN | {"SLURM_TASKS_PER_NODE": "4(x2)", "SLURM_NODEID": "2"},
            "SLURM_TASKS_PER_NODE is '4(x2)' and SLURM_NODEID '2': no number of tasks; start with srun",
        ),
    ],
)
def test_ranks_of_a_node_that_cannot_be_read(environ, message):
    with pytest.raises(UserError) as error:
        read_world(environ)
    assert str(error.value) == message
