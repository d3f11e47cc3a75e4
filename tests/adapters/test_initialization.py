"""What a fresh adapter starts from."""

import math

import pytest
import torch

from comol_ds.adapters.initializers import identity_cores, kaiming_uniform_fan_in, orthogonal_cores
from comol_ds.adapters.mixing import mix_cores
from tests.adapters.models import layer


def test_paper_initialization_bounds():
    torch.manual_seed(0)
    wrapped = layer(400, 30, r=16, num_experts=8)
    for name, fan_in in {"comol_A": 400, "comol_cores": 16, "comol_router": 16}.items():
        values, bound = getattr(wrapped, name)["default"], 1 / math.sqrt(fan_in)
        assert values.abs().max() <= bound
        assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert not wrapped.comol_B["default"].any()
    assert layer(400, 30, r=16, router="input").comol_router["default"].abs().max() <= 1 / math.sqrt(400)


def test_nonzero_b_on_request():
    values = layer(20, 30, r=4, init_adapter_weights=False).comol_B["default"]
    assert 0.3 < values.abs().max() <= 0.5


def test_kaiming_is_torchs_own_for_a_matrix():
    torch.manual_seed(3)
    ours = kaiming_uniform_fan_in(torch.empty(5, 9))
    torch.manual_seed(3)
    theirs = torch.nn.init.kaiming_uniform_(torch.empty(5, 9), a=math.sqrt(5))
    torch.testing.assert_close(ours, theirs)


def test_orthogonal_cores():
    cores = orthogonal_cores(torch.empty(3, 6, 6, dtype=torch.float64))
    torch.testing.assert_close(cores @ cores.mT, torch.eye(6, dtype=torch.float64).expand(3, 6, 6))
    assert not torch.allclose(cores[0], cores[1])


@pytest.mark.parametrize("experts", [1, 2, 8])
def test_identity_cores_are_lora_at_uniform_gates(experts):
    cores = identity_cores(torch.empty(experts, 16, 16, dtype=torch.float64))
    torch.testing.assert_close(cores.mean(0), torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-15)
    distance = torch.linalg.matrix_norm(cores - torch.eye(16), ord=2)
    assert (distance < 0.3).all()
    assert experts == 1 or (distance > 0.01).all()


@pytest.mark.parametrize(("core_init", "strength"), [("paper", 0.204), ("orthogonal", 0.354), ("identity", 1.0)])
def test_strength_of_the_fresh_path_relative_to_lora(core_init, strength):
    """|o| / |h| at E=8, r=16, about 1/sqrt(3 E), 1/sqrt(E) and 1, as the configuration's documentation says."""
    torch.manual_seed(1)
    wrapped = layer(256, 64, r=16, lora_alpha=16, num_experts=8, core_init=core_init)
    h = torch.randn(500, 256, dtype=torch.float64) @ wrapped.comol_A["default"].T
    p = wrapped.gates(h @ wrapped.comol_router["default"].T, h.dtype)
    ratio = mix_cores(h, p, wrapped.comol_cores["default"], wrapped.scaling["default"]).norm() / h.norm()
    assert ratio.item() == pytest.approx(strength, rel=0.12)


def test_a_seed_gives_one_adapter_whatever_the_base_dtype():
    fp32, bf16 = (layer(12, 9, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    for wrapped in (fp32, bf16):
        torch.manual_seed(12)
        wrapped.add_adapter("second", r=4, lora_alpha=4, num_experts=3, init_adapter_weights=False)
    for name in fp32.adapter_layer_names:
        a, b = getattr(fp32, name)["second"], getattr(bf16, name)["second"]
        assert a.dtype == b.dtype == torch.float32
        assert torch.equal(a, b)
