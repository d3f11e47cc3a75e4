"""The flags of launch/plan.py: its own and those of launch/train.py."""

import argparse
from dataclasses import dataclass
from typing import Any, NoReturn

from comol_ds.config import RunConfig
from comol_ds.ds_config import load_ds_json
from comol_ds.errors import UserError
from comol_ds.parallel.groups import quiet_libraries
from comol_ds.planner.plan import Planner
from comol_ds.planner.report import as_json, table, verdict
from comol_ds.planner.request import resolve
from comol_ds.planner.search import available, nearest_fit

# Weaker than what the user says: a plan is for accelerators, which compute in bfloat16, and reads no data.
DEFAULTS: dict[str, Any] = {"bf16": True, "dataset": "not-read"}

_DESCRIPTION = """Plan a run from its configuration alone: memory per rank, communication per step, and whether it fits.
Reads the model's configuration, neither weights nor data, and needs no GPU. Besides the flags below it takes those of
launch/train.py, of which model, adapter, batch, length, optimizer, activations and layout count."""
_EXAMPLE = """example: python launch/plan.py --model_name_or_path meta-llama/Llama-3.1-70B --world_size 8
--ds_config ds_configs/zero3.json --per_device_train_batch_size 1 --max_length 4096 --activation_checkpointing full"""


@dataclass(frozen=True)
class Options:
    """The planner's own flags; memory in bytes."""

    world_size: int
    nodes: int
    device_memory: int
    json: bool


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def split_flags(argv: list[str]) -> tuple[Options, list[str]]:
    """The planner's flags, and the rest, which are flags of a run.

    Raises:
        UserError: one of the planner's flags is missing or has a value that it cannot have.
    """
    parser = _Parser(prog="plan.py", description=_DESCRIPTION, epilog=_EXAMPLE, allow_abbrev=False)
    parser.add_argument("--world_size", type=int, required=True, help="ranks in all")
    parser.add_argument("--nodes", type=int, default=1, help="nodes that they are on (default: 1)")
    parser.add_argument(
        "--device_memory_gb", type=float, default=80.0, help="memory of a device, in GiB of 2^30 bytes (default: 80)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, memory in bytes")
    values, rest = parser.parse_known_args(argv)
    for name in ("world_size", "nodes", "device_memory_gb"):
        if not getattr(values, name) > 0:
            raise UserError(f"--{name} {getattr(values, name)}: must be positive")
    device_memory = int(values.device_memory_gb * 2**30)
    return Options(values.world_size, values.nodes, device_memory, values.json), rest


def plan_run(options: Options, config: RunConfig) -> dict[str, Any] | str:
    """What is to be printed: a dictionary for --json, else text.

    Raises:
        UserError: a run that would be refused.
    """
    quiet_libraries()
    planner, template = Planner(), load_ds_json(config.run.ds_config)
    request = resolve(config, template, options.world_size, options.nodes)
    plan, nearest = planner.plan(request), None
    if plan.peak > available(options.device_memory):
        nearest = nearest_fit(planner, request, template, options.device_memory)
    if options.json:
        return as_json(plan, options.device_memory, nearest)
    return f"{table(plan)}\n\n{verdict(plan, options.device_memory, nearest)}"
