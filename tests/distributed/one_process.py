"""The reference that every distributed run must equal: the literal training loop in one plain PyTorch process."""

import dataclasses
import itertools
from functools import cache

import pytest
import torch
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM

from comol_ds.adapters.comol_layer import CoMoLLinear
from comol_ds.config import RouterSettings
from comol_ds.parallel.assemble import attach_adapter, build_optimizer, build_schedule
from comol_ds.parallel.zero_partition import adapter_state_dict
from comol_ds.training.step import model_inputs
from tests.distributed.equality_cases import Case
from tests.router_recount import Recount, assert_same_statistics

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
    losses, norms, router_losses = [], [], []
    routers = LiteralRouterLosses(model, config.router)
    recount = Recount(model, from_inputs=case.dropout == 0)
    batches = [case.batch(step) for step in range(case.steps)]
    for batch in batches:
        logits = model(**model_inputs(batch, torch.device("cpu"))).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        router_loss, values = routers.of_batch(batch["record_index"] >= 0)
        (loss + router_loss).backward()
        norms.append(float(clip_grad_norm_(trainable, config.optimizer.max_grad_norm)))
        losses.append(loss.item())
        router_losses.append(values)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    weights = adapter_state_dict(model, {n: p.detach() for n, p in model.named_parameters() if p.requires_grad})
    detailed = [step == case.steps - 1 for step in range(case.steps)]
    load = recount.statistics(batches, [batch["record_index"] >= 0 for batch in batches], detailed)
    return {"losses": losses, "norms": norms, "router_losses": router_losses, "weights": weights, "load": load}


class LiteralRouterLosses:
    """The losses on routers and cores as they are written down, over the whole batch, from what the routers compute."""

    def __init__(self, model: torch.nn.Module, settings: RouterSettings) -> None:
        self.settings = settings
        self.layers = [module for module in model.modules() if isinstance(module, CoMoLLinear)]
        self.routed: list[tuple[torch.Tensor, torch.Tensor]] = []
        for layer in self.layers:
            layer.gates.register_forward_hook(lambda _, args, p: self.routed.append((args[0], p)))
        self.load = [
            torch.full((layer.num_experts["default"],), 1 / layer.num_experts["default"]) for layer in self.layers
        ]

    def of_batch(self, valid: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        """Their weighted sum, and each alone; valid [B, T] bool."""
        routed, self.routed[:] = list(self.routed), []
        gates = [p[valid].mean(0) for _, p in routed]
        pairs = [
            (p.shape[0] * (load * p).sum(), torch.logsumexp(logits[valid], dim=1).square().mean())
            for p, load, (logits, _) in zip(gates, self.load, routed, strict=True)
        ]
        self.load = [p.detach() for p in gates]
        means = [torch.stack(values).mean() for values in zip(*pairs, strict=True)]
        diversity = sum(_squared_cosine(layer.comol_cores["default"]) for layer in self.layers)
        values = dict(
            zip(("router_aux_loss", "router_z_loss", "core_diversity_loss"), (*means, diversity), strict=True)
        )
        coefficients = {name: getattr(self.settings, f"{name}_coef") for name in values}
        total = sum(coefficients[name] * value for name, value in values.items())
        return total, {name: value.item() for name, value in values.items() if coefficients[name]}


def _squared_cosine(cores: torch.Tensor) -> torch.Tensor:
    """cores [E, R, R]: mean over pairs of different ones."""
    pairs = list(itertools.combinations(cores.flatten(1), 2))
    return sum(torch.cosine_similarity(a, b, dim=0).square() for a, b in pairs) / len(pairs)


def expected_of(case: Case, models: str) -> dict:
    """The reference of a case: layout, ZeRO stage, accumulation and checkpointing change nothing in one process."""
    everywhere = {"ds_config": "zero3", "accumulation": 1, "tensor_parallel": 1, "tp_plan": None}
    plain = dataclasses.replace(case, **everywhere, checkpointing="none", offload="none", partition=False)
    return one_process(plain, models)


def assert_equals_one_process(found: dict, case: Case, models: str) -> None:
    """Training, router statistics and router losses of a case."""
    expected = expected_of(case, models)
    assert_equal_training(found, expected)
    assert_equal_router_load(found, expected)
    assert_equal_router_losses(found, expected)


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


def assert_equal_router_load(found: dict, expected: dict) -> None:
    """Every token counts once, with what the routers of the reference computed."""
    assert_same_statistics(found["load"], expected["load"], rel=TOLERANCE, absolute=1e-6)


def assert_equal_router_losses(found: dict, expected: dict) -> None:
    """Every loss of every step."""
    for mine, reference in zip(found["router_losses"], expected["router_losses"], strict=True):
        assert mine == pytest.approx(reference, rel=TOLERANCE)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()
