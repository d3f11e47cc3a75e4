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
        (SRUN, World(5, 8, 1)),
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
