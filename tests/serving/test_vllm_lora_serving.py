"""LoRA folders under real vLLM: CoMoL through our plugin, static ones with and without it, against transformers.

Everything is fp32: in bf16 two correct servers differ by more than what is asserted here.
"""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from comol_ds.adapters.adapter_folder import KEY_PREFIX, TENSOR_FILE
from comol_ds.export.lora_folder import write_lora
from comol_ds.export.static_core import static_lora
from comol_ds.export.vllm_lora import GUARD, write_vllm_lora
from tests.serving.servable import acting_adapter, random_prompt, save_servable_model
from tests.serving.vllm_offline import Load, Request, Score, Unload, exact_logprobs, run_vllm

pytestmark = pytest.mark.serving

TOLERANCE = 1e-5  # of a log-probability
LORA_SERVER = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 32}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A base, two CoMoL adapters and three static LoRAs on it: folders, and the models that say what is right."""
    root = tmp_path_factory.mktemp("served")
    base = save_servable_model(root / "base")
    models = {None: AutoModelForCausalLM.from_pretrained(base).eval()}

    def comol(name: str, seed: int, **config) -> Path:
        model = acting_adapter(base, seed, **config)
        write_vllm_lora(get_peft_model_state_dict(model), model.peft_config["default"], base, root / name)
        models[root / name] = model
        return root / name

    def peft(folder: Path) -> Path:
        models[folder] = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
        return folder

    def plain(name: str, seed: int, **config) -> Path:
        torch.manual_seed(seed)
        config = LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **config)
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(root / name)
        return peft(root / name)

    def static(name: str, seed: int, **config) -> Path:
        model = acting_adapter(base, seed, **config)
        tensors = get_peft_model_state_dict(model)
        experts = {key: value for key, value in tensors.items() if key.endswith(".comol_cores")}
        cores = {module_of(key): value.double().mean(0) for key, value in experts.items()}
        write_lora(static_lora(tensors, model.peft_config["default"], cores), base, root / name)
        return peft(root / name)

    core = comol("core", 1, r=4, num_experts=4, lora_alpha=8)
    return SimpleNamespace(
        base=base,
        models=models,
        core=core,
        head=with_a_module_renamed(core, root / "head", "model.layers.1.self_attn.o_proj", "lm_head"),
        # k and gate lack an update where vLLM has one fused Linear; E*R = 24 is no rank that vLLM has
        input=comol(
            "input", 2, r=8, num_experts=3, router="input", target_modules=["q_proj", "v_proj", "up_proj", "down_proj"]
        ),
        plain=plain("plain", 3, r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "o_proj", "down_proj"]),
        other=plain("other", 4, r=32, lora_alpha=16, target_modules=["q_proj", "v_proj", "gate_proj", "up_proj"]),
        # exported with one constant core per module; k, gate and up are zero-filled
        static=static("static", 5, r=8, num_experts=3, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"]),
    )


def with_a_module_renamed(folder: Path, target: Path, module: str, name: str) -> Path:
    shutil.copytree(folder, target)
    path = target / TENSOR_FILE
    save_file({key.replace(f".{module}.", f".{name}."): tensor for key, tensor in load_file(path).items()}, path)
    return target


def module_of(key: str) -> str:
    return key.removeprefix(KEY_PREFIX).rpartition(".")[0]


def assert_exact(served, step: Score, results) -> None:
    for request, scored in zip(step.requests, results, strict=True):
        assert len(scored.token_ids) == len(request.token_ids) + step.new_tokens
        exact = exact_logprobs(served.models[request.adapter], scored)
        without = exact_logprobs(served.models[None], scored)
        assert (scored.logprobs - exact).abs().max() <= TOLERANCE, request.adapter
        if request.adapter is not None:
            assert (exact - without).abs().max() > 0.1  # the adapter does something


def requests(*adapters: Path | None) -> list[Request]:
    return [Request(random_prompt(7 + 2 * n, seed=n), adapter) for n, adapter in enumerate(adapters)]


def test_comol_adapters_plain_loras_and_the_base_share_a_batch_and_slots_change_hands(served):
    mixed = Score(requests(served.core, served.input, None, served.plain, served.core), new_tokens=4)
    # three slots: `other` moves into that of `core`, which comes back into that of `plain`
    evicting = Score(requests(served.other, None, served.input), new_tokens=2)
    evicted = Score(requests(served.core, served.other), new_tokens=2)
    steps = [Load(served.head), mixed, evicting, evicted, Unload(served.core), evicted]
    results = run_vllm(served.base, steps, **LORA_SERVER)
    assert f"{served.head} adapts lm_head, which this server runs without LoRA; see --lora-target-modules" in results[0]
    assert results[4] is None
    for step, result in zip(steps, results, strict=True):
        if isinstance(step, Score):
            assert_exact(served, step, result)


def test_two_ranks_with_fully_sharded_loras_are_exact_too(served):
    mixed = Score(requests(served.core, served.input, None, served.plain, served.core), new_tokens=4)
    (result,) = run_vllm(served.base, [mixed], tensor_parallel=2, fully_sharded_loras=True, **LORA_SERVER)
    assert_exact(served, mixed, result)


def test_two_ranks_without_fully_sharded_loras_refuse_a_comol_adapter_and_serve_the_rest(served):
    rest = Score(requests(served.plain, None), new_tokens=2)
    error, result = run_vllm(served.base, [Load(served.core), rest], tensor_parallel=2, **LORA_SERVER)
    assert (
        f"{served.core} is a CoMoL adapter and tensor_parallel_size is 2: start vLLM with --fully-sharded-loras"
        in error
    )
    assert_exact(served, rest, result)


def test_a_vllm_without_the_plugin_refuses_comol_folders_and_serves_static_ones_as_peft_does(served):
    # The third slot stays empty: vLLM 0.32 without the plugin gives the base the LoRA of the last one, on the CPU.
    static = Score(requests(served.plain, served.static, None), new_tokens=4)
    steps = [Load(served.core), Load(served.input), static]
    *errors, result = run_vllm(served.base, steps, environment={"VLLM_PLUGINS": ""}, **LORA_SERVER)
    for error in errors:
        assert f"{GUARD} is unsupported LoRA weight" in error
    assert_exact(served, static, result)
