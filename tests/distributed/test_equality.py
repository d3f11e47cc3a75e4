"""DeepSpeed on two ranks against one plain PyTorch process: losses, gradient norms and adapter weights in fp32."""

import dataclasses
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from comol_ds.adapters.routing import Gates
from comol_ds.config import ModelSettings
from comol_ds.parallel.assemble import attach_adapter, build_base, build_optimizer, build_schedule
from comol_ds.parallel.zero_partition import adapter_state_dict
from tests.distributed.equality_cases import BF16_CASES, CASES, GLOBAL_BATCH, STEPS, Case
from tests.distributed.launching import run_deepspeed
from tests.tiny_models import FAMILIES, random_batch, save_tiny_model

TOLERANCE = 1e-5  # relative, fp32


@cache
def one_process(case: Case, models: str) -> dict:
    """The literal loop: whole batch, mean over labelled tokens, clip, step. No DeepSpeed, no accumulation."""
    config = case.run_config(models)
    base = build_base(ModelSettings(), config.model.model_name_or_path, bf16=False)
    model = attach_adapter(base, config.adapter, config.run.seed, bf16=False)
    optimizer = build_optimizer(model, config.optimizer)
    schedule = build_schedule(optimizer, config.optimizer, STEPS)
    trainable = [p for p in model.parameters() if p.requires_grad]
    losses, norms, gates = [], [], {}
    for name, module in model.named_modules():
        if isinstance(module, Gates):
            gates[name.removeprefix("base_model.model.").removesuffix(".gates")] = collected = []
            module.register_forward_hook(lambda _, __, p, collected=collected: collected.append(p.detach()))
    valid = []
    for step in range(STEPS):
        batch = random_batch(GLOBAL_BATCH, seed=step)
        valid.append(batch["attention_mask"].bool())
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        loss.backward()
        norms.append(float(clip_grad_norm_(trainable, config.optimizer.max_grad_norm)))
        losses.append(loss.item())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    weights = adapter_state_dict(model, {n: p.detach() for n, p in model.named_parameters() if p.requires_grad})
    load = {name: torch.stack(p)[torch.stack(valid)].double().mean(0).tolist() for name, p in gates.items()}
    return {"losses": losses, "norms": norms, "weights": weights, "load": load}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, extensions):
    """Every case trained once by two processes; the processes start once."""
    folder = tmp_path_factory.mktemp("equality")
    for family in FAMILIES:
        save_tiny_model(folder / family, family)
    worker = Path(__file__).parent / "equality_worker.py"
    run = run_deepspeed(2, worker, [str(folder), str(folder)], extensions, timeout=280)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return folder


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_one_process(case, two_ranks):
    found = torch.load(two_ranks / f"{case.name}.pt")
    # accumulation, ZeRO stage and checkpointing change nothing in one process: one reference per optimizer
    plain = dataclasses.replace(case, ds_config="zero3", accumulation=1, checkpointing="none")
    expected = one_process(plain, str(two_ranks))
    assert found["losses"] == pytest.approx(expected["losses"], rel=TOLERANCE)
    assert found["norms"] == pytest.approx(expected["norms"], rel=TOLERANCE)
    assert found["weights"].keys() == expected["weights"].keys()
    worst = max(relative(found["weights"][name], expected["weights"][name]) for name in expected["weights"])
    assert worst <= TOLERANCE


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_router_load_counts_every_token_once(case, two_ranks):
    """However the batch is split, and whether or not the layers are recomputed."""
    found = torch.load(two_ranks / f"{case.name}.pt")["load"]
    tokens = sum(int(random_batch(GLOBAL_BATCH, seed=step)["attention_mask"].sum()) for step in range(STEPS))
    assert found["tokens"] == tokens
    plain = dataclasses.replace(case, ds_config="zero3", accumulation=1, checkpointing="none")
    expected = one_process(plain, str(two_ranks))["load"]
    for layer, share in found["layers"].items():
        assert share["mean_gate"] == pytest.approx(expected[layer], rel=TOLERANCE)
        assert sum(share["argmax_share"]) == pytest.approx(1)


@pytest.mark.distributed
@pytest.mark.parametrize("case", BF16_CASES, ids=lambda case: case.name)
def test_bf16_stays_near_fp32_and_saves_master_weights(case, two_ranks):
    found = torch.load(two_ranks / f"{case.name}.pt")
    expected = one_process(dataclasses.replace(case, ds_config="zero3", bf16=False), str(two_ranks))
    # bfloat16 has 8 bits: 2^-8 = 0.4 % per rounding, and a loss averages over many tokens
    assert found["losses"] == pytest.approx(expected["losses"], rel=2**-8)
    down = next(tensor for name, tensor in found["weights"].items() if name.endswith("comol_A"))
    assert down.dtype == torch.float32
    assert not torch.equal(down, down.bfloat16().float()), "saved from the fp32 master copy, not the working copy"
