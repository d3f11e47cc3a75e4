"""The Triton kernels of the core-space mixture compute what the equation says.

Here they run in Triton's interpreter on CPU tensors; where there is a GPU, on it too.
"""

import re

import pytest
import torch

from comol_ds.adapters.mixing import mix_cores
from tests.adapters.largest_result import LargestResult
from tests.adapters.models import layer
from tests.adapters.oracle import comol_update
from tests.adapters.require_triton import require_triton

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SCALE = 1.7
# of the largest norm-wise error: outputs and gradients are rounded once to the activations' dtype. bf16 keeps 8 bits,
# and the interpreter cuts off where a GPU rounds to nearest.
TOLERANCES = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


@pytest.fixture
def kernels(monkeypatch):
    """The module of the kernels."""
    require_triton()
    from comol_ds.adapters import mixing_triton

    monkeypatch.setenv("COMOL_KERNEL", "triton")
    return mixing_triton


@pytest.fixture(params=DEVICES)
def device(request, kernels, monkeypatch):
    """A device on which mix_cores runs the kernels."""
    monkeypatch.setenv("TRITON_INTERPRET", "1" if request.param == "cpu" else "0")
    return request.param


def inputs(n, r, experts, device, dtype=torch.float32, core_dtype=torch.float32):
    """h, p, cores and a gradient of o; the cores hold numbers of the activations' dtype."""
    torch.manual_seed(0)
    h, p = torch.randn(n, r), torch.softmax(torch.randn(n, experts), -1)
    cores, grad_o = torch.randn(experts, r, r).to(dtype), torch.randn(n, r)
    leaves = h.to(device, dtype), p.to(device, dtype), cores.to(device, core_dtype)
    return *(leaf.requires_grad_() for leaf in leaves), grad_o.to(device, dtype)


def literal_mixture(h, p, cores):
    """Token by token, in the inputs' dtype."""
    merged = [sum(gate * core for gate, core in zip(row, cores, strict=True)) for row in p]
    return SCALE * torch.stack([token @ core for token, core in zip(h, merged, strict=True)])


def with_gradients(function, h, p, cores, grad_o):
    o = function(h, p, cores)
    return o, *torch.autograd.grad(o, (h, p, cores), grad_o)


def kernel_results(h, p, cores, grad_o):
    return with_gradients(lambda *leaves: mix_cores(*leaves, SCALE), h, p, cores, grad_o)


def oracle_results(h, p, cores, grad_o):
    leaves = [tensor.detach().cpu().double().requires_grad_() for tensor in (h, p, cores)]
    return with_gradients(literal_mixture, *leaves, grad_o.cpu().double())


def assert_within(tolerance, got, expected):
    for name, ours, exact in zip(("o", "grad_h", "grad_p", "grad_cores"), got, expected, strict=True):
        error = (ours.detach().cpu().double() - exact).norm() / exact.norm()
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize(
    ("n", "r", "experts"),
    [(1, 16, 2), (67, 8, 4), (32, 16, 1), (130, 32, 3), (45, 24, 5), (33, 64, 8), (35, 100, 2), (33, 128, 2),
     (19, 8, 64)],
)  # fmt: skip
def test_fp32_equals_the_float64_oracle_in_o_and_every_gradient(device, n, r, experts):
    tensors = inputs(n, r, experts, device)
    got = kernel_results(*tensors)
    assert all(tensor.dtype == torch.float32 for tensor in got)
    assert_within(TOLERANCES[torch.float32], got, oracle_results(*tensors))


@pytest.mark.parametrize("core_dtype", [torch.float32, None], ids=["fp32-cores", "narrow-cores"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_activations_are_as_exact_as_their_dtype(device, dtype, core_dtype):
    tensors = inputs(70, 24, 3, device, dtype, core_dtype or dtype)
    got = kernel_results(*tensors)
    assert [tensor.dtype for tensor in got] == [dtype, dtype, dtype, core_dtype or dtype]
    assert_within(TOLERANCES[dtype], got, oracle_results(*tensors))


def test_fp32_cores_are_rounded_to_the_activations_dtype_as_in_the_torch_path(device):
    h, p, _, _ = inputs(40, 16, 3, device, torch.float16)
    cores = torch.randn(3, 16, 16, device=device)
    assert torch.equal(mix_cores(h, p, cores, SCALE), mix_cores(h, p, cores.half(), SCALE))


def test_sums_are_fp32_even_over_many_bf16_tokens(device):
    """Ones add up exactly in fp32; a bf16 sum would stop growing at 256."""
    n, r, experts = 1024, 8, 2
    h, p = torch.ones(n, r, dtype=torch.bfloat16), torch.ones(n, experts, dtype=torch.bfloat16)
    cores = torch.zeros(experts, r, r, device=device, requires_grad=True)
    mix_cores(h.to(device), p.to(device), cores, 1.0).float().sum().backward()
    assert torch.equal(cores.grad, torch.full_like(cores, n))


@pytest.mark.parametrize("router", ["core", "input"])
def test_a_whole_layer_equals_the_oracle(device, router):
    torch.manual_seed(0)
    wrapped = layer(24, 20, dtype=torch.float32, r=8, router=router, init_adapter_weights=False).to(device)
    x = torch.randn(3, 11, 24)
    parameters = {name: getattr(wrapped, name)["default"] for name in wrapped.adapter_layer_names}
    exact = {name: parameter.detach().cpu().double().requires_grad_() for name, parameter in parameters.items()}
    expected = comol_update(x.double(), exact, 6 / 8, router)
    expected.sin().sum().backward()
    update = wrapped.update(x.to(device), "default")
    update.sin().sum().backward()
    torch.testing.assert_close(update.cpu().double(), expected, rtol=1e-5, atol=1e-6)
    for name, parameter in parameters.items():
        error = (parameter.grad.cpu().double() - exact[name].grad).norm() / exact[name].grad.norm()
        assert error <= 1e-5, name


def test_float64_is_left_to_torch(device):
    h, p, cores, _ = (tensor.detach().double() for tensor in inputs(5, 8, 3, device))
    assert torch.autograd.gradcheck(lambda *a: mix_cores(*a, SCALE), [leaf.requires_grad_() for leaf in (h, p, cores)])


def test_an_empty_batch(device):
    h, p, cores, grad_o = inputs(0, 8, 3, device)
    o, grad_h, grad_p, grad_cores = kernel_results(h, p, cores, grad_o)
    assert o.shape == grad_h.shape == (0, 8)
    assert grad_p.shape == (0, 3)
    assert torch.equal(grad_cores, torch.zeros_like(cores))


def test_strided_tensors_give_the_same_bits(device):
    h, p, cores, grad_o = inputs(20, 8, 3, device)
    expected = kernel_results(h, p, cores, grad_o)
    strided = [tensor.detach().t().contiguous().t().requires_grad_() for tensor in (h, p)]
    strided.append(cores.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_())
    got = kernel_results(*strided, grad_o.t().contiguous().t())
    assert not any(tensor.is_contiguous() for tensor in strided)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, expected, strict=True))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_only_the_gradients_that_are_needed(device, wanted):
    *leaves, grad_o = inputs(20, 8, 3, device)
    _, *expected = kernel_results(*leaves, grad_o)
    some = [leaf.detach().requires_grad_(number in wanted) for number, leaf in enumerate(leaves)]
    mix_cores(*some, SCALE).backward(grad_o)
    for number, leaf in enumerate(some):
        assert torch.equal(leaf.grad, expected[number]) if number in wanted else leaf.grad is None


def test_no_tensor_per_token_expert_and_rank_is_allocated(device):
    n, r, experts = 96, 16, 8
    h, p, cores, grad_o = inputs(n, r, experts, device)
    with LargestResult() as largest:
        kernel_results(h, p, cores, grad_o)
    # one partial sum of the cores' gradient, whose 4 bytes the interpreter counts one by one
    assert largest.numel in (experts * r * r, 4 * experts * r * r)
    assert largest.numel < n * experts * r


def test_the_cores_gradient_in_several_partial_sums_is_right_and_reproducible(device, kernels, monkeypatch):
    tensors = inputs(333, 8, 2, device)
    monkeypatch.setattr(kernels, "LEAST_STEPS", 1)
    assert kernels.splits(333, 2, kernels.CORE_TILES[0].tokens) == (11, 1)
    first, again = kernel_results(*tensors), kernel_results(*tensors)
    assert_within(TOLERANCES[torch.float32], first, oracle_results(*tensors))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, again, strict=True))


@pytest.mark.parametrize("experts", [1, 2, 3, 8, 64, 600])
def test_splits_cover_every_token_in_a_bounded_number_of_partial_sums(kernels, experts):
    for n in (1, 31, 32, 33, 1000, 8192, 100_001, 10_000_000):
        parts, steps = kernels.splits(n, experts, 32)
        assert (parts - 1) * steps * 32 < n <= parts * steps * 32
        assert parts * experts <= max(kernels.MOST_PARTIAL_SUMS, experts)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("dtype", "r"), [("bf16", 64), ("fp16", 24), ("fp32", 16)])
def test_the_kernels_compile_for_a_gpu_and_use_no_atomics(kernels, monkeypatch, tmp_path, dtype, r, capability):
    """The interpreter accepts what the compiler may not; compiling needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(triton.language.sum, triton.JITFunction):
        pytest.skip("missing: a triton that compiles; this one was imported with TRITON_INTERPRET=1")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"R": r, "E": 8, "PADDED": max(16, triton.next_power_of_2(r)), "PRECISION": "ieee", "WIDEN": False}
    types = {"n": "i32", "steps": "i32", "scale": "fp32", "cores": "*fp32", "partial": "*fp32"}
    wide = dtype == "fp32"
    token_tile = (kernels.TOKEN_TILES_FP32 if wide else kernels.TOKEN_TILES)[0]
    core_tile = (kernels.CORE_TILES_FP32 if wide else kernels.CORE_TILES)[0]
    for kernel, tile in (
        (kernels._mix_kernel, token_tile),
        (kernels._token_gradients_kernel, token_tile),
        (kernels._core_gradients_kernel, core_tile),
    ):
        given = constants | {"TOKENS": tile.tokens, "NEEDS_H": True, "NEEDS_P": True}
        function = kernels._jit(kernel, False)
        names = function.arg_names
        signature = {name: "constexpr" if name in given else types.get(name, f"*{dtype}") for name in names}
        source = ASTSource(function, signature, constexprs={name: given[name] for name in names if name in given})
        options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
        binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert not re.search(r"^\s*(@\S+ )?(atom|red)\.", binary.asm["ptx"], re.MULTILINE)
        assert ("mma" in binary.asm["ptx"]) is not wide  # tensor cores


@pytest.mark.skipif(not torch.cuda.is_available(), reason="missing: a CUDA GPU")
@pytest.mark.parametrize(("dtype", "r"), [(torch.bfloat16, 64), (torch.float32, 128)])
def test_tuning_changes_no_bit(kernels, monkeypatch, dtype, r):
    from comol_ds.adapters import tile_tuning

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    tensors = inputs(5000, r, 8, "cuda", dtype)
    results = []
    for tune_from in (1, 10_000):
        monkeypatch.setattr(tile_tuning, "_fastest", {})
        monkeypatch.setattr(tile_tuning, "TUNE_FROM", tune_from)
        results.append(kernel_results(*tensors))
        assert len(tile_tuning._fastest) == (3 if tune_from == 1 else 0)  # one per kernel
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))
