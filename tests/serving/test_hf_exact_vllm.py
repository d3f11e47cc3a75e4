"""hf-exact checkpoints in vLLM's Transformers backend: the log-probabilities of the trained model, at TP 1 and 2."""

import copy

import pytest
import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict

from comol_ds.export.hf_exact import write_hf_exact
from tests.serving.servable import acting_adapter, random_prompt, save_servable_model
from tests.serving.vllm_offline import Request, Score, exact_logprobs, run_vllm

pytestmark = pytest.mark.serving

EVERY_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Some of what vLLM would fuse, with biases, and row-parallel routers whose logits the ranks sum, on one of two layers.
SOME_OF_ONE_LAYER = {
    "router": "input", "target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    "layers_to_transform": [1],
}  # fmt: skip
CASES = {
    "modules trained whole, 1 rank": (
        "llama",
        {"target_modules": ["o_proj"], "modules_to_save": ["lm_head", "norm"]},
        1,
    ),
    "every Linear, 2 ranks": ("llama", {"target_modules": EVERY_LINEAR}, 2),
    "some Linears of one layer, 2 ranks": ("qwen2", SOME_OF_ONE_LAYER, 2),
    "sliding windows and normed heads, 2 ranks": ("gemma3", {"target_modules": EVERY_LINEAR}, 2),
}


def train(base, adapter: dict) -> PeftModel:
    """An adapter whose routing matters, and modules trained whole that differ from the base's.

    Routers as sharp as `acting_adapter` leaves them turn one rounding in fp32 into 1e-5 nats.
    """
    model = acting_adapter(base, seed=3, r=4, num_experts=3, **adapter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "comol_router" in name:
                parameter.mul_(0.25)
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) / 10)
    return model


def without_routing(model: PeftModel) -> PeftModel:
    """The same experts, mixed alike for every token."""
    alike = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in alike.named_parameters():
            if "comol_router" in name:
                parameter.zero_()
    return alike


FURTHER = ("some Linears of one layer, 2 ranks", "sliding windows and normed heads, 2 ranks")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.exhaustive if name in FURTHER else ()) for name in CASES]
)
def test_log_probabilities_are_those_of_the_trained_model(name, tmp_path):
    family, adapter, ranks = CASES[name]
    base = save_servable_model(tmp_path / "base", family)
    trained = train(base, adapter)
    write_hf_exact(base, trained.peft_config["default"], get_peft_model_state_dict(trained), tmp_path / "served")
    requests = [Request(random_prompt(length, seed=length)) for length in (7, 19, 40)]
    [scored] = run_vllm(
        tmp_path / "served",
        [Score(requests, new_tokens=4)],
        tensor_parallel=ranks,
        model_impl="transformers",
        trust_remote_code=True,
        environment={"HF_HOME": str(tmp_path / "hf")},
    )
    alike = without_routing(trained)
    for one in scored:
        expected = exact_logprobs(trained, one)
        assert (expected - exact_logprobs(alike, one)).abs().max() > 0.05
        assert (one.logprobs - expected).abs().max() <= 1e-5
