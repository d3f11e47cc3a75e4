"""What stands between a wrong kernel and a training run: the check on the GPU, here on kernels of our own."""

import pytest
import torch

from comol_ds.adapters import mixing
from comol_ds.adapters.kernel_check import check_kernels
from comol_ds.errors import UserError

SIZES = [(8, 2), (24, 5), (64, 8)]


def tensors(r: int, experts: int, dtype: torch.dtype, cores_dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return (
        torch.zeros(3, r, dtype=dtype),
        torch.zeros(3, experts, dtype=dtype),
        torch.zeros(experts, r, r, dtype=cores_dtype),
    )


def forward(h, p, cores, scale):
    return mixing._forward(h, p, cores, scale)


def backward(h, p, cores, grad_o, scale, *needs):
    return mixing._backward(h, p, cores, grad_o, scale, needs)


@pytest.mark.parametrize(("r", "experts"), SIZES)
@pytest.mark.parametrize(
    ("dtype", "cores_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
)
def test_right_kernels_pass(r, experts, dtype, cores_dtype):
    """Both have been run and compared by then."""
    ran = []

    def noted(kernel):
        return lambda *arguments: ran.append(kernel) or kernel(*arguments)

    check_kernels(noted(forward), noted(backward), *tensors(r, experts, dtype, cores_dtype))
    assert set(ran) == {forward, backward}


FAULTS = {
    "o": lambda o: o.roll(1, 0),
    "grad_h": lambda grad: grad * 1.01,
    "grad_p": lambda grad: torch.zeros_like(grad),
    "grad_cores": lambda grad: grad.transpose(1, 2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_any_result_is_named(name, dtype):
    def broken_forward(*given):
        o = forward(*given)
        return FAULTS["o"](o) if name == "o" else o

    def broken_backward(*given):
        found = dict(zip(("grad_h", "grad_p", "grad_cores"), backward(*given), strict=True))
        return tuple(FAULTS[key](value) if key == name else value for key, value in found.items())

    with pytest.raises(UserError, match=f"^the Triton kernels compute {name} wrongly on this GPU: relative error "):
        check_kernels(broken_forward, broken_backward, *tensors(24, 5, dtype, torch.float32))


def test_values_that_are_not_numbers_are_a_fault():
    with pytest.raises(UserError, match="compute o wrongly"):
        check_kernels(
            lambda *given: forward(*given) * torch.nan, backward, *tensors(8, 2, torch.float32, torch.float32)
        )
