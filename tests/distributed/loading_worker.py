"""One rank of the loading test: loads models in every layout, compares with transformers, and meets faults.

Usage: deepspeed loading_worker.py MODELS OUTPUT_FOLDER
"""

import errno
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from deepspeed.runtime.zero import GatheredParameters
from peft import PeftModel
from transformers import AutoModelForCausalLM

from comol_ds.errors import UserError
from comol_ds.parallel import groups
from comol_ds.parallel.assemble import build_model
from comol_ds.parallel.loading import plain_name
from tests.distributed.equality_cases import Case
from tests.distributed.test_loading import LOAD_CASES, LoadCase


@contextmanager
def counted_reads():
    """Yields a list that grows by the bytes of every read of a tensor."""
    asked, preadv = [], os.preadv

    def count(file, to, at):
        asked.append(len(to[0]))
        return preadv(file, to, at)

    with patch.object(os, "preadv", count):
        yield asked


def build(case: LoadCase, path: str, models: str) -> PeftModel:
    run = Case("zero3", 1, "sgd", "none", family=case.family, train_head=case.train_head)
    zero = {"stage": case.stage, **case.zero}
    ds_config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": case.bf16}, "zero_optimization": zero}
    groups.arrange(case.tensor_parallel)
    return build_model(run.run_config(models), path, ds_config, case.bf16, groups.mesh())[0]


def whole(parameter: torch.nn.Parameter, shape: torch.Size) -> torch.Tensor:
    """The unsharded parameter, over partitions and slices."""
    if getattr(parameter, "ds_secondary_tensor", None) is not None:
        parameter.all_gather_coalesced([parameter]).wait()  # as a forward pass does; it reads hpZ's second copy
        local = parameter.detach().clone()
        parameter.partition()
    elif hasattr(parameter, "ds_tensor"):
        with GatheredParameters([parameter]):
            local = parameter.detach().clone()
    else:
        local = parameter.detach()
    if local.shape == shape:
        return local
    dim = next(dim for dim, total in enumerate(shape) if local.shape[dim] != total)
    return torch.cat(groups.gather_objects(local, "gather a parameter"), dim)


def load(case: LoadCase, models: str) -> dict:
    """Which parameters, buffers or paddings are not as they must be; bytes asked of the files, and held of them."""
    path = f"{models}/{case.family}"
    with counted_reads() as asked:
        model = build(case, path, models)
    dtype = torch.bfloat16 if case.bf16 else torch.float32
    state = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    expected = dict(state.named_parameters(remove_duplicate=False))
    named = [(name, p) for name, p in model.named_parameters(remove_duplicate=False) if "comol_" not in name]
    wrong = sorted(expected.keys() ^ {plain_name(name) for name, _ in named})
    held = {}
    for name, parameter in named:
        reference = expected[plain_name(name)]
        found = whole(parameter, reference.shape)
        if found.dtype != reference.dtype or not torch.equal(found, reference):
            wrong.append(name)
        memory = getattr(parameter, "ds_tensor", parameter)
        held[id(parameter)] = memory.numel() * 4  # the files hold fp32
        if hasattr(parameter, "ds_tensor"):
            padding = memory.numel() * torch.distributed.get_world_size(parameter.ds_process_group) - reference.numel()
            last = torch.distributed.get_rank(parameter.ds_process_group) == 1
            if case.tensor_parallel == 1 and last and padding and memory[-padding:].any():
                wrong.append(f"padding of {name}")
    for (name, found), (_, reference) in zip(model.named_buffers(), state.named_buffers(), strict=True):
        if found.dtype != reference.dtype or not torch.equal(found, reference):
            wrong.append(name)
    return {"wrong": wrong, "asked": sum(asked), "held": sum(held.values())}


def fault(rank: int, models: str, what: str) -> str:
    """What this rank is told when rank 1 alone meets a fault; all ranks go on to the next collective."""
    path, preadv = f"{models}/llama", os.preadv

    def fail(file, to, at):
        if what == "disk error":
            raise OSError(errno.EIO, "Input/output error")
        return 0 if at > 100_000 else preadv(file, to, at)

    if rank == 1 and what == "missing tensor":
        path = f"{models}/incomplete"
    try:
        with patch.object(os, "preadv", fail if rank == 1 and what != "missing tensor" else preadv):
            build(LoadCase("llama", 1, 3, False), path, models)
    except UserError as error:
        return str(error)
    return "nothing"


def main() -> None:
    models, output = sys.argv[-2:]
    world = groups.read_world()
    groups.initialize(world, timeout_minutes=2)
    report = {"faults": {what: fault(world.rank, models, what) for what in ("disk error", "cut", "missing tensor")}}
    report |= {case.name: load(case, models) for case in LOAD_CASES}
    (Path(output) / f"rank{world.rank}.json").write_text(json.dumps(report))
    groups.shut_down()


if __name__ == "__main__":
    main()
    groups.exit_process(0)
