"""The reference that every distributed run must equal: the literal training loop in one plain PyTorch process."""

import dataclasses
from functools import cache

import pytest
import torch
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM

from comol_ds.adapters.routing import Gates
from comol_ds.parallel.assemble import attach_adapter, build_optimizer, build_schedule
from comol_ds.parallel.zero_partition import adapter_state_dict
from tests.distributed.equality_cases import Case
from tests.tiny_models import random_batch

TOLERANCE = 1e-5  # relative, fp32


@cache
def one_process(case: Case, models: str) -> dict:
    """The literal loop: whole batch, mean over labelled tokens, clip, step. No DeepSpeed, no accumulation."""
    config = case.run_config(models)
    base = AutoModelForCausalLM.from_pretrained(config.model.model_name_or_path, dtype=torch.float32)
    model = attach_adapter(base, config.adapter, config.run.seed)
    optimizer = build_optimizer(model, config.optimizer)
    schedule = build_schedule(optimizer, config.optimizer, case.steps)
    trainable = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(config.run.seed)  # dropout starts where a run's first data-parallel rank starts
    losses, norms, gates = [], [], {}
    for name, module in model.named_modules():
        if isinstance(module, Gates):
            gates[name.removeprefix("base_model.model.").removesuffix(".gates")] = collected = []
            module.register_forward_hook(lambda _, __, p, collected=collected: collected.append(p.detach()))
    valid = []
    for step in range(case.steps):
        batch = random_batch(case.global_batch, seed=step)
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


def expected_of(case: Case, models: str) -> dict:
    """The reference of a case: layout, ZeRO stage, accumulation and checkpointing change nothing in one process."""
    everywhere = {"ds_config": "zero3", "accumulation": 1, "tensor_parallel": 1, "tp_plan": None}
    plain = dataclasses.replace(case, **everywhere, checkpointing="none", offload="none", partition=False)
    return one_process(plain, models)


def assert_equal_training(found: dict, expected: dict) -> None:
    """Losses and gradient norms of every step, and the final weights."""
    assert found["losses"] == pytest.approx(expected["losses"], rel=TOLERANCE)
    assert found["norms"] == pytest.approx(expected["norms"], rel=TOLERANCE)
    assert found["weights"].keys() == expected["weights"].keys()
    worst = max(relative(found["weights"][name], expected["weights"][name]) for name in expected["weights"])
    assert worst <= TOLERANCE


def assert_bf16_training(found: dict, case: Case, models: str) -> None:
    """Losses near those of fp32, and an adapter from the fp32 master copy, not the working copy."""
    expected = expected_of(dataclasses.replace(case, bf16=False), models)
    # bfloat16 has 8 bits: 2^-8 = 0.4 % per rounding, and a loss averages over many tokens
    assert found["losses"] == pytest.approx(expected["losses"], rel=2**-8)
    down = next(tensor for name, tensor in found["weights"].items() if name.endswith("comol_A"))
    assert down.dtype == torch.float32
    assert not torch.equal(down, down.bfloat16().float())


def assert_equal_router_load(found: dict, case: Case, expected: dict) -> None:
    """Every token counts once, with the gates of the reference."""
    steps = range(case.steps)
    tokens = sum(int(random_batch(case.global_batch, seed=step)["attention_mask"].sum()) for step in steps)
    assert found["tokens"] == tokens
    for layer, share in found["layers"].items():
        assert share["mean_gate"] == pytest.approx(expected[layer], rel=TOLERANCE)
        assert sum(share["argmax_share"]) == pytest.approx(1)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()
