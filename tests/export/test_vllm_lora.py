"""The LoRA form of a CoMoL adapter for vLLM: its tensors with the gate between them, its folder, its refusals."""

import json
import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from comol_ds import CoMoLConfig
from comol_ds.adapters.adapter_folder import read_adapter
from comol_ds.adapters.comol_layer import CoMoLLinear
from comol_ds.errors import UserError
from comol_ds.export.vllm_lora import GUARD, expand_adapter, write_vllm_lora
from comol_ds.export.vllm_plugin import (
    BASE,
    PLAIN,
    GateSizes,
    activate_adapter,
    gate,
    init_punica_wrapper,
    read_sizes,
    register,
)
from tests.adapters.models import tiny_llama
from tests.tiny_models import make_adapter_act

MODULE = "base_model.model.model.layers.0.self_attn.q_proj"


def acting(**config):
    """A CoMoL model whose adapter changes the output, and its tensors."""
    torch.manual_seed(7)
    model = get_peft_model(tiny_llama(), CoMoLConfig(**config)).eval()
    make_adapter_act(model)
    return model, get_peft_model_state_dict(model)


def served_update(x, expanded, module, sizes, width):
    """What vLLM computes: shrink into a buffer of its max_lora_rank, gate, expand."""
    lora_a, lora_b = (expanded[f"{module}.lora_{name}.weight"] for name in "AB")
    buffer = x.new_zeros(*x.shape[:-1], width)
    buffer[..., : lora_a.shape[0]] = x @ lora_a.T
    tokens = torch.ones(x.shape[-2], dtype=torch.long)
    gated = gate(buffer, tokens * sizes.r, tokens * sizes.num_experts)
    return gated[..., : lora_b.shape[1]] @ lora_b.T


@pytest.mark.parametrize("router", ["core", "input"])
@pytest.mark.parametrize(("r", "num_experts", "width"), [(4, 3, 16), (8, 4, 32), (2, 2, 8)])
def test_shrink_gate_and_expand_give_the_layers_update(router, r, num_experts, width):
    model, tensors = acting(r=r, num_experts=num_experts, router=router, lora_alpha=6, core_init="orthogonal")
    expanded = expand_adapter(tensors, model.peft_config["default"])
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, CoMoLLinear)}
    assert len(layers) == len(expanded) // 2 > 0
    for name, layer in layers.items():
        x = torch.randn(20, layer.in_features, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            exact = layer.update(x, "default")
            served = served_update(x, expanded, name, GateSizes(r, num_experts), width)
        assert exact.abs().max() > 0.1
        torch.testing.assert_close(served, exact, rtol=1e-6, atol=1e-6 * float(exact.abs().max()))


def test_tokens_of_several_adapters_a_plain_lora_and_the_base_share_a_buffer():
    buffer = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))  # two slices of a fused Linear
    r, num_experts = torch.tensor([GateSizes(4, 3), PLAIN, GateSizes(2, 5), BASE, GateSizes(4, 3)]).unbind(1)
    together = gate(buffer, r, num_experts)
    assert torch.equal(together[:, 1], buffer[:, 1])
    assert not together[:, 3].any()
    for token in (0, 2, 4):
        h, logits = buffer[:, token, : r[token]], buffer[:, token, r[token] : r[token] + num_experts[token]]
        expected = torch.softmax(logits, -1)[:, :, None] * h[:, None, :]
        used = r[token] * num_experts[token]
        torch.testing.assert_close(together[:, token, :used], expected.flatten(1))
        assert torch.isfinite(together[:, token]).all()  # what is left of W meets zeros of lora_B


class Wrapper:
    """As much of vLLM's punica wrapper as the gate meets."""

    def __init__(self, tokens):
        self._token_lora_indices = torch.full((tokens,), 99)  # uninitialized in vLLM

    def add_expand(self, y, x, scale):
        return y + scale * torch.stack(tuple(x)).sum(0)


def manager_of(wrapper, slots):
    return SimpleNamespace(
        lora_slots=slots,
        device="cpu",
        punica_wrapper_mapping={"language_model": wrapper, "same": wrapper},
        lora_index_to_id=[None] * slots,
        _registered_adapters={},
    )


def put(manager, slot, lora_id, sizes=None):
    """What vLLM does when an adapter moves into a slot, with the plugin around it."""

    def vllms_own(manager, lora_id):
        manager.lora_index_to_id[slot] = lora_id
        return True

    manager._registered_adapters[lora_id] = SimpleNamespace(**({"comol_sizes": sizes} if sizes else {}))
    activate_adapter(vllms_own, manager, lora_id)


def test_a_graph_compiled_before_an_adapter_was_loaded_serves_it_and_what_comes_into_its_slot():
    graphs = []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    wrapper = Wrapper(tokens=8)
    manager = manager_of(wrapper, slots=2)
    init_punica_wrapper(lambda manager: None, manager)
    compiled = torch.compile(lambda y, x: wrapper.add_expand(y, x, scale=2), fullgraph=True, backend=counting)
    buffers = torch.randn(2, 3, 12).unbind()  # two slices, three tokens of the eight that fit
    y = torch.randn(3, 12)
    assert torch.equal(compiled(y, buffers), y)  # all of the base
    wrapper._token_lora_indices[:3] = torch.tensor([0, -1, 1])
    put(manager, 0, 7, GateSizes(2, 3))
    put(manager, 1, 8)
    for sizes in (GateSizes(2, 3), GateSizes(4, 2), PLAIN):
        put(manager, 0, 9, sizes)
        rows = torch.tensor([sizes, BASE, PLAIN]).unbind(1)
        expected = y + 2 * sum(gate(buffer, *rows) for buffer in buffers)
        torch.testing.assert_close(compiled(y, buffers), expected)
    assert len(graphs) == 1


def test_the_folder_is_a_lora_of_rank_e_times_r_that_only_the_plugin_reads(tmp_path):
    model, tensors = acting(r=4, num_experts=3, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    assert write_vllm_lora(tensors, model.peft_config["default"], "some/base", tmp_path / "served") == 16
    values = json.loads((tmp_path / "served" / "adapter_config.json").read_text())
    assert values == {
        "peft_type": "COMOL_VLLM",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/base",
        "r": 12,
        "lora_alpha": 12,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["down_proj", "q_proj"],
        "inference_mode": True,
        "comol": {"version": 1, "r": 4, "num_experts": 3, "router": "core"},
    }
    written = load_file(tmp_path / "served" / "adapter_model.safetensors")
    in_features, out_features = tensors[f"{MODULE}.comol_A"].shape[1], tensors[f"{MODULE}.comol_B"].shape[0]
    assert written[f"{MODULE}.lora_A.weight"].shape == (12, in_features)
    assert written[f"{MODULE}.lora_B.weight"].shape == (out_features, 12)
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    assert written.keys() - {f"{key.rpartition('.')[0]}.lora_{name}.weight" for key in tensors for name in "AB"} == {
        GUARD
    }
    assert read_sizes(tmp_path / "served") == GateSizes(4, 3)
    with pytest.raises(UserError, match="peft_type 'COMOL_VLLM', expected 'COMOL'"):
        read_adapter(tmp_path / "served")
    with pytest.raises(KeyError, match="COMOL_VLLM"):
        PeftConfig.from_pretrained(str(tmp_path / "served"))


REFUSED = [
    (
        {"r": 128, "num_experts": 8},
        "r=128 with num_experts=8 is a LoRA of rank 1024 in vLLM, whose largest max_lora_rank is 512; "
        "use --format hf-exact",
    ),
    (
        {"r": 4, "num_experts": 1},
        "r=4 with num_experts=1: a LoRA of rank 4 has no room for the 4 + 1 rows of the down-projection and the "
        "router; use --format lora, which is exact with one expert",
    ),
    (
        {"r": 1, "num_experts": 8},
        "r=1 with num_experts=8: a LoRA of rank 8 has no room for the 1 + 8 rows of the down-projection and the "
        "router; use --format hf-exact",
    ),
    (
        {"modules_to_save": ["embed_tokens"]},
        "modules_to_save embed_tokens: a LoRA in vLLM holds no whole modules; use --format hf-exact",
    ),
    (
        {"target_modules": ["q_proj", "lm_head"]},
        "lm_head is adapted; vLLM gates Linears of decoder layers only; use --format hf-exact",
    ),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_what_vllm_cannot_serve_exactly_is_refused_in_one_line(tmp_path, config, message):
    model, tensors = acting(**config)
    with pytest.raises(UserError) as error:
        write_vllm_lora(tensors, model.peft_config["default"], "some/base", tmp_path / "served")
    assert str(error.value) == message
    assert not list(tmp_path.iterdir())


def gate_of(r, num_experts) -> dict:
    return {"version": 1, "r": r, "num_experts": num_experts}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"comol": {"version": 2, "r": 4, "num_experts": 3}},
            "{path} is of version 2, this plugin reads version 1: install the comol_ds that wrote it, or export again",
        ),
        ({"r": 16}, "{path} has rank 16, but r=4 and num_experts=3; export again"),
        ({"comol": gate_of(4, None)}, "{path} has r=4 and num_experts=None; export again"),
        ({"comol": gate_of({}, 3)}, "{path} has r={{}} and num_experts=3; export again"),
        ({"comol": gate_of(-4, -3)}, "{path} has r=-4 and num_experts=-3; export again"),
        ({"comol": gate_of(4.0, 3)}, "{path} has r=4.0 and num_experts=3; export again"),
        ({"comol": gate_of(4, 10**9), "r": 4 * 10**9}, "{path} has r=4 and num_experts=1000000000; export again"),
        ({"comol": gate_of(32, 32), "r": 1024}, "{path} has rank 1024, but r=32 and num_experts=32; export again"),
        ({"comol": gate_of(1, 12)}, "{path} has rank 12, but r=1 and num_experts=12; export again"),
        ({"r": "12"}, "{path} has rank '12', but r=4 and num_experts=3; export again"),
        (
            {"comol": "yes"},
            "{path} is of version None, this plugin reads version 1: install the comol_ds that wrote it, or export"
            " again",
        ),
    ],
)
def test_the_plugin_refuses_a_folder_whose_configuration_it_does_not_understand(tmp_path, changed, message):
    values = {"r": 12, "comol": {"version": 1, "r": 4, "num_experts": 3}} | changed
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(values))
    with pytest.raises(UserError) as error:
        read_sizes(tmp_path)
    assert str(error.value) == message.format(path=path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda a, b: {"lora_A": a[:8]}, "{file}: {module}.lora_A.weight' has shape [8, 32], the adapter's rank is 12"),
        (lambda a, b: {"lora_A": a.T}, "{file}: {module}.lora_A.weight' has shape [32, 12], the adapter's rank is 12"),
        (
            lambda a, b: {"lora_B": b[:, :8]},
            "{file}: {module}.lora_B.weight' has shape [32, 8], the adapter's rank is 12",
        ),
        (lambda a, b: {"lora_B": b[:, 0]}, "{file}: {module}.lora_B.weight' has shape [32], the adapter's rank is 12"),
        (lambda a, b: {"bias": b}, "{file}: {module}.bias.weight' has shape [32, 12], the adapter's rank is 12"),
        (lambda a, b: {"lora_B": None}, "{file}: {module}.lora_A.weight' has no {module}.lora_B.weight' beside it"),
        (lambda a, b: {GUARD: None}, "{file} has no tensor " + GUARD),
    ],
    ids=["rows of A", "A transposed", "columns of B", "a vector", "another tensor", "no B", "no guard"],
)
def test_the_plugin_compares_the_shapes_with_r_and_num_experts(tmp_path, damage, message):
    """vLLM itself would load each of these without a word."""
    model, tensors = acting(r=4, num_experts=3, target_modules=["q_proj"])
    write_vllm_lora(tensors, model.peft_config["default"], "some/base", tmp_path)
    assert read_sizes(tmp_path) == GateSizes(4, 3)
    file = tmp_path / "adapter_model.safetensors"
    written = load_file(file)
    for name, tensor in damage(*(written[f"{MODULE}.lora_{part}.weight"] for part in "AB")).items():
        key = name if name == GUARD else f"{MODULE}.{name}.weight"
        written.pop(key, None)
        if tensor is not None:
            written[key] = tensor.clone(memory_format=torch.contiguous_format)
    save_file(written, file)
    with pytest.raises(UserError) as error:
        read_sizes(tmp_path)
    assert str(error.value) == message.format(file=file, module=f"'{MODULE}") + "; export again"


def test_the_plugin_names_files_that_cannot_be_read(tmp_path):
    model, tensors = acting(r=4, num_experts=3, target_modules=["q_proj"])
    write_vllm_lora(tensors, model.peft_config["default"], "some/base", tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"^{file} cannot be read as safetensors"):
        read_sizes(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text("[" * 10_000)
    with pytest.raises(UserError, match=rf"^{config} cannot be read: it is nested too deeply; export again$"):
        read_sizes(tmp_path)


def test_the_plugin_leaves_plain_loras_and_what_is_no_folder_to_vllm(tmp_path):
    assert read_sizes(tmp_path / "nowhere") is None
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    assert read_sizes(tmp_path) is None


@pytest.mark.parametrize("version", ["0.33.0", "0.31.2", "1.32.0"])
def test_beside_another_vllm_the_plugin_says_so_and_changes_nothing(monkeypatch, caplog, version):
    # has nothing to patch: touching more than the version would raise
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__=version))
    with caplog.at_level(logging.WARNING, logger="vllm.comol_ds"):
        register.__wrapped__()
    assert caplog.messages == [
        f"comol_ds: the plugin is for vLLM 0.32.*, this is {version}: CoMoL adapters will be refused, all else is "
        "unchanged"
    ]
