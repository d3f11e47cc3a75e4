"""Who we are among the ranks, and small control messages between them. The only reader of RANK, WORLD_SIZE, SLURM_*.

Control messages (errors, counts, record ids) go over gloo, also beside NCCL: they live in host memory, and gloo's
monitored barrier can say which rank is missing.
"""

import atexit
import logging
import os
import re
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from comol_ds.errors import UserError
from comol_ds.layout import RankGrid
from comol_ds.parallel.mesh import Mesh
from comol_ds.parallel.shared_memory import remove_abandoned_buffers, remove_own_buffers

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all.

    Attributes:
        rank: global rank.
        size: number of processes.
        local_rank: rank on this node.
        local_size: number of processes on this node; None becomes ``size``, a world of one node.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int | None = None

    def __post_init__(self) -> None:
        if self.local_size is None:
            object.__setattr__(self, "local_size", self.size)


def read_world(environ: dict[str, str] | None = None) -> World:
    """Read the place that the launcher gave this process: deepspeed and torchrun set RANK, srun sets SLURM_PROCID.

    Plain ``python`` is a world of one. Nothing is initialized.

    Raises:
        UserError: only a part of a launcher's variables is set, or one is no number.
    """
    env = os.environ if environ is None else environ
    if "RANK" in env:
        names = ["RANK", "WORLD_SIZE", "LOCAL_RANK"]
        names += [name for name in _LOCAL_SIZES if name in env][:1]
    elif "SLURM_PROCID" in env and env.get("SLURM_NTASKS", "1") != "1":
        names = ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"]
    else:
        return World(0, 1, 0)
    missing = [name for name in names if name not in env]
    if missing:
        raise UserError(f"{names[0]} is set but {', '.join(missing)} is not; start with deepspeed, torchrun or srun")
    for name in names:
        if not env[name].isdigit():
            raise UserError(f"{name} is {env[name]!r}, not a number; start with deepspeed, torchrun or srun")
    world = World(*(int(env[name]) for name in names))
    return world if "RANK" in env else replace(world, local_size=_tasks_on_this_node(env))


_LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")  # torchrun's and deepspeed's name for the ranks of a node


def _tasks_on_this_node(env: dict[str, str]) -> int | None:
    """The tasks that srun has placed on this node: the SLURM_NODEID-th number of "4,3(x2)", which is 4, 3, 3.

    None if srun does not say it.
    """
    name = next((name for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE") if name in env), None)
    if name is None:
        return None
    text, node = env[name], env.get("SLURM_NODEID", "0")
    runs = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in text.split(",")]
    counts = [int(run[1]) for run in runs if run for _ in range(int(run[2] or 1))]
    if not all(runs) or not node.isdigit() or int(node) >= len(counts):
        raise UserError(f"{name} is {text!r} and SLURM_NODEID {node!r}: no number of tasks; start with srun")
    return counts[int(node)]


def job_end_time(environ: dict[str, str] | None = None) -> float | None:
    """Unix time at which SLURM ends this job; None outside of one, or where nobody says it: Slurm 22.05 does
    not, launch/slurm/job.sh does.

    Raises:
        UserError: SLURM_JOB_END_TIME is no number.
    """
    text = (os.environ if environ is None else environ).get("SLURM_JOB_END_TIME")
    if text is None:
        return None
    if not text.isdigit():
        raise UserError(f"SLURM_JOB_END_TIME is {text!r}, not a Unix time; unset it")
    return float(text)


def node_name() -> str:
    """This node's name: SLURM's where it has one, which can differ from the machine's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def quiet_libraries() -> None:
    """DeepSpeed 0.19 calls collectives that torch 2.13 has renamed: one FutureWarning per call site and rank."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|transformers")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


def initialize(world: World, timeout_minutes: float, tensor_parallel: int = 1) -> None:
    """Join the process group and arrange the mesh; every later wait for another rank ends after ``timeout_minutes``."""
    os.environ.update(_rendezvous(world))
    if world.local_rank == 0 and (removed := remove_abandoned_buffers()):
        print(f"deleted {len(removed)} buffers that killed runs have left in {removed[0].parent}", flush=True)
    timeout = timedelta(minutes=timeout_minutes)
    get_accelerator().set_device(world.local_rank)
    deepspeed.init_distributed(timeout=timeout, auto_mpi_discovery=False, verbose=False)
    _Control.timeout = timeout
    if dist.get_backend() != "gloo":
        _Control.group = dist.new_group(backend="gloo", timeout=timeout)
    arrange(tensor_parallel)


def arrange(tensor_parallel: int) -> None:
    """Create the groups of data_parallel x tensor_parallel ranks. A collective call."""
    grid = RankGrid(dist.get_rank(), dist.get_world_size(), tensor_parallel)
    _Control.mesh = Mesh(grid, _Control.timeout)


def mesh() -> Mesh:
    """The ranks as they are arranged now; one rank before `initialize`."""
    return _Control.mesh


def shut_down() -> None:
    """Leave the process group, if there is one, and delete this rank's buffers of DeepSpeed's CPU communication."""
    if not dist.is_initialized():
        return
    port, rank = int(os.environ["MASTER_PORT"]), dist.get_rank()
    deepspeed.comm.destroy_process_group()
    _Control.group, _Control.mesh = None, Mesh(RankGrid(0, 1))
    remove_own_buffers(port, rank)


def exit_process(code: int) -> NoReturn:
    """End this process after the exit handlers, without the interpreter's teardown.

    gloo's worker threads outlive destroy_process_group (4 of them after a run on two ranks, torch 2.13). One that drops
    a tensor while the interpreter is being torn down aborts the process ("terminate called without an active
    exception"), seen once in about 50 launches, and a run that has done all its work would count as crashed.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # a terminal or a pipe that is gone does not change what became of the run
            stream.flush()
    os._exit(code)


def barrier(step: str) -> None:
    """Wait for all ranks; past the time limit, raise a RuntimeError that names the missing ranks and ``step``."""
    try:
        dist.monitored_barrier(_Control.group, timeout=_Control.timeout, wait_all_ranks=True)
    except RuntimeError as error:
        raise RuntimeError(f"waiting for all ranks at {step!r}: {error}") from error


def together(step: str, action: Callable[[], T]) -> T:
    """Run ``action`` on every rank and go on only if it worked on all: an error on one is raised on all.

    A `UserError` stays one; anything else becomes a RuntimeError that names the first failing rank.
    """
    result, error = None, None
    try:
        result = action()
    except Exception as caught:
        error = caught
    reports = gather_objects(None if error is None else (isinstance(error, UserError), str(error)), step)
    if error is not None:
        raise error
    failures = [(rank, report) for rank, report in enumerate(reports) if report is not None]
    if failures:
        rank, (by_user, message) = failures[0]
        raise UserError(message) if by_user else RuntimeError(f"rank {rank} failed at {step!r}: {message}")
    return result


def first_on_each_node(world: World, step: str, action: Callable[[], T]) -> T:
    """Run ``action`` on local rank 0, then on the others, which find its work in the cache."""
    if world.local_rank == 0:
        return together(step, action)  # the others wait in the call below
    together(step, lambda: None)
    return action()


def gather_objects(value: Any, step: str) -> list[Any]:
    """Every rank's picklable ``value``, in rank order, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    barrier(step)
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_Control.group)
    return values


def sum_over_data_parallel(values: torch.Tensor) -> torch.Tensor:
    """Element-wise sum over the ranks that see different records, in place, on the tensor's own device.

    Tensor-parallel peers see the same records: each gets the sum, in which nothing counts twice.
    """
    if mesh().grid.data_parallel > 1:
        dist.all_reduce(values, group=mesh().data_group)
    return values


def sum_over_tensor_parallel(values: torch.Tensor) -> torch.Tensor:
    """Element-wise sum over the ranks that see the same records, in place, on the tensor's own device."""
    if mesh().grid.tensor_parallel > 1:
        dist.all_reduce(values, group=mesh().tensor_group)
    return values


def sum_over_world(values: torch.Tensor) -> torch.Tensor:
    """Element-wise sum over all ranks, in place, on the tensor's own device."""
    if mesh().grid.size > 1:
        dist.all_reduce(values)
    return values


class _Control:
    """The gloo group of the control messages, where None is the default group, and the arranged mesh."""

    group: dist.ProcessGroup | None = None
    timeout = timedelta(minutes=30)
    mesh = Mesh(RankGrid(0, 1))


def _rendezvous(world: World) -> dict[str, str]:
    """The variables that torch's env:// rendezvous reads, where the launcher has not set them."""
    variables = {"RANK": str(world.rank), "WORLD_SIZE": str(world.size), "LOCAL_RANK": str(world.local_rank)}
    if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        return variables
    if world.size == 1:
        return variables | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    if "SLURM_JOB_ID" not in os.environ:
        raise UserError("MASTER_ADDR and MASTER_PORT are not set; start with deepspeed, torchrun or srun")
    nodes = subprocess.run(
        ["scontrol", "show", "hostnames"], capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()
    # one port per job and restart, so that a requeued job never meets its own old rendezvous
    job, restart = int(os.environ["SLURM_JOB_ID"]), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    return variables | {"MASTER_ADDR": nodes[0], "MASTER_PORT": str(20000 + (job * 7 + restart) % 10000)}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
