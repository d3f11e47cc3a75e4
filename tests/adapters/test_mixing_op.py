"""The core-space mixture as an operation: gradients, memory between the passes, dtypes, the largest intermediate."""

import pytest
import torch
import torch.nn.functional as F

from comol_ds.adapters import mixing
from comol_ds.adapters.mixing import mix_cores
from comol_ds.planner.counting import SavedBytes
from tests.adapters.largest_result import LargestResult
from tests.adapters.models import layer


def inputs(n=6, r=4, e=3, dtype=torch.float64):
    torch.manual_seed(0)
    h = torch.randn(n, r, dtype=dtype, requires_grad=True)
    p = torch.softmax(torch.randn(n, e, dtype=dtype), -1).requires_grad_()
    cores = torch.randn(e, r, r, dtype=dtype, requires_grad=True)
    return h, p, cores


@pytest.mark.parametrize("chunk", [mixing.CHUNK_ELEMENTS, 24], ids=["whole", "two-token-chunks"])
def test_gradcheck(monkeypatch, chunk):
    monkeypatch.setattr(mixing, "CHUNK_ELEMENTS", chunk)
    assert torch.autograd.gradcheck(lambda *a: mix_cores(*a, 1.7), inputs(n=5))


def test_chunks_change_nothing_but_the_order_of_sums(monkeypatch):
    h, p, cores = inputs(n=7)
    whole = mix_cores(h, p, cores, 0.5)
    whole_grads = torch.autograd.grad(whole.sin().sum(), (h, p, cores))
    monkeypatch.setattr(mixing, "CHUNK_ELEMENTS", 1)
    chunked = mix_cores(h, p, cores, 0.5)
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(torch.autograd.grad(chunked.sin().sum(), (h, p, cores)), whole_grads)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_only_the_gradients_that_are_needed(wanted):
    everything = inputs()
    expected = torch.autograd.grad(mix_cores(*everything, 2.0).sin().sum(), everything)
    some = [tensor.detach().requires_grad_(i in wanted) for i, tensor in enumerate(everything)]
    mix_cores(*some, 2.0).sin().sum().backward()
    for i, tensor in enumerate(some):
        if i in wanted:
            torch.testing.assert_close(tensor.grad, expected[i])
        else:
            assert tensor.grad is None


def test_strided_inputs_and_an_empty_batch():
    h, p, cores = inputs()
    wide = torch.cat([torch.randn_like(h), h], dim=1).detach()
    torch.testing.assert_close(mix_cores(wide[:, 4:], p, cores, 1.0), mix_cores(h, p, cores, 1.0))
    empty = mix_cores(h[:0], p[:0], cores, 1.0)
    assert empty.shape == (0, 4)
    (grad,) = torch.autograd.grad(empty.sum(), cores)
    assert torch.equal(grad, torch.zeros_like(cores))


def test_double_backward_is_refused_instead_of_wrong():
    h, p, cores = inputs()
    (grad,) = torch.autograd.grad(mix_cores(h, p, cores, 1.0).sin().sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(("r", "experts", "limit"), [(64, 8, 600), (16, 8, 180)])
def test_saved_bytes_per_token(r, experts, limit):
    n, width = 128, 256
    wrapped = layer(width, width, dtype=torch.float32, r=r, num_experts=experts)
    x = torch.randn(2, n // 2, width, requires_grad=True)
    saved = SavedBytes([x, *wrapped.parameters()])
    with saved:
        wrapped.update(x, "default")
    total = sum(saved.storages)
    # h and o of R numbers, p of E numbers, 4 bytes each
    assert total / n == 4 * (2 * r + experts)
    assert total / n <= limit


@pytest.mark.parametrize("router", ["core", "input"])
def test_no_tensor_per_token_and_core_entry(router):
    n, r, experts, width = 96, 16, 4, 40
    wrapped = layer(width, width, dtype=torch.float32, r=r, num_experts=experts, router=router)
    x = torch.randn(n, width, requires_grad=True)
    with LargestResult() as largest:
        wrapped(x).sum().backward()
    assert largest.numel == n * experts * r  # the outer product of gates and h
    assert largest.numel < n * r * r


def test_paper_dropout_does_hold_a_core_per_token_and_only_in_training():
    n, r, width = 96, 16, 40
    wrapped = layer(width, width, dtype=torch.float32, r=r, lora_dropout=0.1, dropout_scheme="paper").train()
    with LargestResult() as largest:
        wrapped(torch.randn(n, width))
    assert largest.numel >= n * r * r
    wrapped.eval()
    with LargestResult() as largest:
        wrapped(torch.randn(n, width))
    assert largest.numel < n * r * r


def test_bf16_activations_with_fp32_cores_give_fp32_gradients():
    h, p, cores = inputs(n=64, dtype=torch.float32)
    o = mix_cores(h.bfloat16(), p.bfloat16(), cores, 2.0)
    exact = mix_cores(h, p, cores, 2.0)
    assert o.dtype == torch.bfloat16
    # bf16 keeps 8 bits: 2^-8 per rounded factor, three of them
    torch.testing.assert_close(o.float(), exact, rtol=0.02, atol=0.02 * exact.abs().max().item())
    (grad,) = torch.autograd.grad(o.float().sum(), cores)
    (exact_grad,) = torch.autograd.grad(exact.sum(), cores)
    assert grad.dtype == torch.float32
    torch.testing.assert_close(grad, exact_grad, rtol=0.02, atol=0.02 * exact_grad.abs().max().item())


def test_chunks_of_bf16_tokens_are_summed_in_the_cores_dtype(monkeypatch):
    """Ones add up exactly in fp32; a bf16 sum would stop growing at 256."""
    n, r, experts = 1024, 2, 2
    h, p = torch.ones(n, r, dtype=torch.bfloat16), torch.ones(n, experts, dtype=torch.bfloat16)
    cores = torch.zeros(experts, r, r, requires_grad=True)
    monkeypatch.setattr(mixing, "CHUNK_ELEMENTS", 1)
    (grad,) = torch.autograd.grad(mix_cores(h, p, cores, 1.0).float().sum(), cores)
    assert torch.equal(grad, torch.full_like(cores, n))


def test_autocast_forward_and_backward():
    torch.manual_seed(0)
    wrapped = layer(24, 20, dtype=torch.float32, r=8, init_adapter_weights=False)
    x = torch.randn(2, 30, 24)
    exact = wrapped(x)
    exact.square().mean().backward()
    expected = {name: getattr(wrapped, name)["default"].grad.clone() for name in wrapped.adapter_layer_names}
    wrapped.zero_grad()
    dtypes = []
    wrapped.gates.register_forward_hook(lambda _, args, out: dtypes.append((args[0].dtype, out.dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = wrapped(x)
        assert y.dtype == F.linear(x, wrapped.base_layer.weight).dtype == torch.bfloat16
    y.float().square().mean().backward()
    assert dtypes == [(torch.bfloat16, torch.bfloat16)]
    for name, value in expected.items():
        grad = getattr(wrapped, name)["default"].grad
        assert grad.dtype == torch.float32
        assert (grad - value).norm() <= 0.03 * value.norm(), name


def test_gates_of_bf16_logits_are_computed_in_fp32():
    wrapped = layer(8, 8, dtype=torch.float32)
    logits = torch.tensor([[0.0, 0.01, 5.0]], dtype=torch.bfloat16)
    p = wrapped.gates(logits, torch.float32)
    torch.testing.assert_close(p, torch.softmax(logits.float(), -1), rtol=0, atol=0)
    assert wrapped.gates(logits.double(), torch.float64).dtype == torch.float64
