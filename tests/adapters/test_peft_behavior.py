"""Everything PEFT promises its users, on a tiny Llama with CoMoL adapters."""

import json
import warnings

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, PeftType, get_peft_model
from peft.utils import get_peft_model_state_dict
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from comol_ds import CoMoLConfig, CoMoLModel
from comol_ds.adapters.comol_layer import CoMoLLinear
from comol_ds.errors import UserError
from tests.adapters.models import comol_config, tiny_llama, tokens


def logits(model, **kwargs):
    with torch.no_grad():
        return model(input_ids=tokens(), **kwargs).logits


def adapted(seed=7, base=None, **overrides):
    base = base if base is not None else tiny_llama()
    torch.manual_seed(seed)
    return get_peft_model(base, comol_config(**overrides)).eval()


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, CoMoLLinear)}


@pytest.fixture
def base_folder(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def test_registered_with_peft():
    assert PeftType("COMOL") is PeftType.COMOL
    assert "COMOL" in list(PeftType)
    assert PeftConfig.from_peft_type(peft_type="COMOL", r=3) == CoMoLConfig(r=3)


def test_fresh_adapter_changes_nothing_and_trains():
    base = tiny_llama()
    expected = logits(base)
    model = adapted(base=base, init_adapter_weights=True)
    assert isinstance(model.base_model, CoMoLModel)
    assert torch.equal(logits(model), expected)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(8):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2


def test_only_adapters_are_trainable(capsys):
    model = adapted()
    names = {name.rpartition(".")[0].rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"comol_A", "comol_B", "comol_cores", "comol_router"}
    model.print_trainable_parameters()
    expected = sum(4 * (m.in_features + m.out_features) + 3 * 20 for m in layers(model).values())
    assert f"trainable params: {expected:,} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("target_modules", "extra", "expected"),
    [
        (["q_proj", "v_proj"], {}, {"q_proj", "v_proj"}),
        (r".*self_attn\.(k|o)_proj", {}, {"k_proj", "o_proj"}),
        ("all-linear", {}, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (None, {}, {"q_proj", "k_proj", "v_proj", "o_proj", "down_proj"}),
        (r".*_proj", {"exclude_modules": r".*mlp.*"}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
    ],
)
def test_target_modules(target_modules, extra, expected):
    model = adapted(target_modules=target_modules, **extra)
    found = layers(model)
    assert {name.rpartition(".")[2] for name in found} == expected
    assert len(found) == 2 * len(expected)


TEXT_MODELS = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"]


def tiny_text_config(model_type):
    return AutoConfig.for_model(
        model_type,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
    )


@pytest.mark.parametrize("model_type", TEXT_MODELS)
def test_default_targets_of_every_known_model_type_train(model_type):
    model = adapted(base=AutoModelForCausalLM.from_config(tiny_text_config(model_type)), target_modules=None)
    assert len(layers(model)) == 2 * 5
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


def test_default_targets_of_gemma3_leave_the_vision_tower_alone():
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=tiny_text_config("gemma3_text").to_dict(),
        vision_config={**vision, "image_size": 28, "patch_size": 14},
    )
    base = Gemma3ForConditionalGeneration(config)
    assert any("vision" in name and name.endswith("q_proj") for name, _ in base.named_modules())
    found = layers(adapted(base=base, target_modules=None))
    assert len(found) == 2 * 5 and not any("vision" in name for name in found)


def test_layers_to_transform():
    model = adapted(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers")
    assert list(layers(model)) == ["base_model.model.model.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize("router", ["core", "input"])
def test_save_and_load(tmp_path, router):
    model = adapted(router=router, core_init="identity", lora_dropout=0.1)
    model.save_pretrained(tmp_path)
    keys = get_peft_model_state_dict(model)
    assert "base_model.model.model.layers.0.self_attn.q_proj.comol_cores" in keys
    assert len(keys) == 4 * 10
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    config = loaded.peft_config["default"]
    assert (config.r, config.num_experts, config.router, config.core_init) == (4, 3, router, "identity")
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    trainable = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    assert any(parameter.requires_grad for parameter in trainable.parameters())


def test_load_with_meta_adapters(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(logits(loaded), logits(model))


def test_auto_peft_model(tmp_path, base_folder):
    model = adapted(base=type(tiny_llama()).from_pretrained(base_folder))
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), logits(model))


def test_transformers_load_adapter(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    plain = tiny_llama()
    before = logits(plain)
    plain.load_adapter(str(tmp_path))
    assert torch.equal(logits(plain), logits(model))
    plain.disable_adapters()
    assert torch.equal(logits(plain), before)
    plain.enable_adapters()
    assert torch.equal(logits(plain), logits(model))


def test_several_adapters_of_different_shape(tmp_path):
    first = adapted(seed=1)
    second = adapted(seed=2, r=6, num_experts=2, router="input", target_modules=["q_proj", "up_proj"])
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    expected = {"default": logits(first), "other": logits(second)}
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "first").eval()
    model.load_adapter(tmp_path / "second", adapter_name="other")
    assert torch.equal(logits(model), expected["default"])
    model.set_adapter("other")
    assert torch.equal(logits(model), expected["other"])
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"other"}
    model.set_adapter("default")
    assert torch.equal(logits(model), expected["default"])
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    assert not torch.allclose(both, expected["default"]) and not torch.allclose(both, expected["other"])
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(logits(model), expected["default"])
    assert not any("other" in key for key in model.state_dict())


def test_second_adapter_on_all_linear():
    model = adapted(target_modules=["q_proj"])
    model.add_adapter("other", comol_config(target_modules="all-linear", r=2))
    assert sorted({tuple(sorted(m.r)) for m in layers(model).values()}) == [("default", "other"), ("other",)]
    expected = logits(model)
    model.set_adapter("other")
    assert not torch.allclose(logits(model), expected)


def test_disable_adapter_is_the_base():
    base = tiny_llama()
    expected = logits(base)
    model = adapted(base=base)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert not torch.allclose(logits(model), expected)


def test_modules_to_save(tmp_path):
    model = adapted(modules_to_save=["lm_head"], target_modules="all-linear")
    assert "base_model.model.lm_head" not in layers(model)
    head = model.base_model.model.lm_head.modules_to_save["default"].weight
    assert head.requires_grad
    with torch.no_grad():
        head.add_(0.1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))


def test_generate():
    model = adapted()
    prompt = tokens(2, 4)
    out = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False)
    step = prompt
    for _ in range(out.shape[1] - 4):
        with torch.no_grad():
            step = torch.cat([step, model(input_ids=step).logits[:, -1:].argmax(-1)], 1)
    finished = (out == 2).cumsum(1) > 0
    assert torch.equal(out[~finished], step[~finished])


def test_bias_in_the_base():
    base = tiny_llama(attention_bias=True)
    for parameter in base.parameters():
        parameter.data.normal_(std=0.1)
    expected = logits(base)
    model = adapted(base=base)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert not torch.allclose(logits(model), expected)


def test_fp32_adapters_on_a_bf16_base():
    model = adapted(base=tiny_llama().bfloat16())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    out = model(input_ids=tokens(), labels=tokens())
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    assert all(p.grad.abs().max() > 0 for n, p in model.named_parameters() if p.requires_grad)
    # the values were drawn in fp32 and never rounded to the base's bf16
    down = model.base_model.model.model.layers[0].self_attn.q_proj.comol_A["default"]
    assert not torch.equal(down, down.bfloat16().float())


def test_meta_adapters_on_a_bf16_base_keep_their_fp32_values(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama().bfloat16(), tmp_path, low_cpu_mem_usage=True)
    expected = get_peft_model_state_dict(model)
    assert all(torch.equal(value, expected[key]) for key, value in get_peft_model_state_dict(loaded).items())


def test_adapters_in_the_base_dtype_on_request():
    model = get_peft_model(tiny_llama().bfloat16(), comol_config(), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
    model(input_ids=tokens(), labels=tokens()).loss.backward()


def test_autocast_over_the_model():
    model = adapted()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    assert loss.item() == pytest.approx(model(input_ids=tokens(), labels=tokens()).loss.item(), rel=0.02)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    model = adapted().train()

    def gradients():
        model.zero_grad()
        model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    plain = gradients()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    torch.testing.assert_close(gradients(), plain)


def test_attaching_does_not_read_the_base_weights():
    """Under ZeRO-3 every base weight has shape (0,) and only in_features and out_features tell its size."""
    base = tiny_llama()
    for parameter in base.parameters():
        parameter.data = torch.empty(0)
    model = get_peft_model(base, comol_config())
    q = model.base_model.model.model.layers[0].self_attn.k_proj
    assert [tuple(getattr(q, name)["default"].shape) for name in q.adapter_layer_names] == [
        (4, 32),
        (16, 4),
        (3, 4, 4),
        (3, 4),
    ]


def test_unload_gives_the_base_back():
    base = tiny_llama()
    expected = logits(base)
    assert torch.equal(logits(adapted(base=base).unload()), expected)


def test_defaults():
    config = CoMoLConfig()
    assert (config.r, config.lora_alpha, config.lora_dropout, config.num_experts) == (16, 16, 0.0, 8)
    assert (config.router, config.core_init, config.dropout_scheme) == ("core", "paper", "input")
    assert config.target_modules is None and config.init_adapter_weights is True


def test_config_survives_the_json(tmp_path):
    config = comol_config(router="input", exclude_modules=["up_proj"], layers_to_transform=[0, 1])
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "COMOL"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert PeftConfig.from_pretrained(str(tmp_path)) == config


def test_partitioned_parameters_are_not_saved_empty(tmp_path):
    """What ZeRO-3 leaves in place of a parameter that is not gathered must never reach a file."""
    model = get_peft_model(tiny_llama(), CoMoLConfig(r=4, target_modules=["q_proj"]))
    next(p for name, p in model.named_parameters() if "comol_B" in name).data = torch.empty(0)
    with pytest.raises(UserError, match=r"comol_B.default is empty, ZeRO-3 holds it in partitions"):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "adapter_model.safetensors").exists()
