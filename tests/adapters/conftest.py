"""The kernels that mix, as a fixture."""

import pytest
import torch

from comol_ds.adapters.mixing import KERNELS, takes_triton
from tests.adapters.require_triton import require_triton


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch):
    """The kernel that mixes fp32 on the CPU; Triton's in its interpreter."""
    if request.param == "triton":
        require_triton()
    monkeypatch.setenv("COMOL_KERNEL", request.param)
    monkeypatch.setenv("TRITON_INTERPRET", "1" if request.param == "triton" else "0")
    assert takes_triton("cpu", (torch.float32, torch.float32), 4) is (request.param == "triton")
    return request.param
