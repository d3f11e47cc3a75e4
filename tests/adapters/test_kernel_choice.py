"""Which kernel mixes: COMOL_KERNEL, the device, the dtypes and the rank."""

import os
import subprocess
import sys

import pytest
import torch

from comol_ds.adapters import mixing
from comol_ds.adapters.mixing import mix_cores, takes_triton
from comol_ds.errors import UserError

HALF, SINGLE, DOUBLE = (torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)


@pytest.mark.parametrize(
    ("kernel", "on", "dtypes", "rank", "has_triton", "capability", "taken"),
    [
        (None, "cuda", HALF, 128, True, (9, 0), True),
        (None, "cuda", SINGLE, 4, True, (8, 0), True),
        (None, "cuda", HALF, 129, True, (9, 0), False),
        (None, "cuda", HALF, 64, True, (7, 5), False),
        (None, "cuda", HALF, 64, False, (9, 0), False),
        (None, "cuda", DOUBLE, 64, True, (9, 0), False),
        (None, "cpu", HALF, 64, True, (9, 0), False),
        ("torch", "cuda", HALF, 64, True, (9, 0), False),
        ("triton", "cuda", HALF, 64, True, (9, 0), True),
        ("triton", "cuda", DOUBLE, 64, True, (9, 0), False),
    ],
)
def test_which_calls_the_kernels_take(monkeypatch, kernel, on, dtypes, rank, has_triton, capability, taken):
    if kernel is None:
        monkeypatch.delenv("COMOL_KERNEL", raising=False)
    else:
        monkeypatch.setenv("COMOL_KERNEL", kernel)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(mixing, "HAS_TRITON", has_triton)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert takes_triton(on, dtypes, rank) is taken


@pytest.mark.parametrize(
    ("kernel", "on", "rank", "has_triton", "message"),
    [
        ("cuda", "cuda", 8, True, "COMOL_KERNEL=cuda is no kernel: set it to torch or triton, or unset it"),
        ("", "cpu", 8, True, "COMOL_KERNEL= is no kernel: set it to torch or triton, or unset it"),
        (
            "triton", "cuda", 8, False,
            "COMOL_KERNEL=triton, but triton is not installed: install it, or unset COMOL_KERNEL",
        ),
        (
            "triton", "cpu", 8, True,
            "COMOL_KERNEL=triton, but the tensors are on the cpu: set TRITON_INTERPRET=1 for Triton's interpreter, "
            "for tests only, or unset COMOL_KERNEL",
        ),
        (
            "triton", "cuda", 256, True,
            "COMOL_KERNEL=triton, but r is 256: set r to at most 128, or unset COMOL_KERNEL",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_refused_in_one_line(monkeypatch, kernel, on, rank, has_triton, message):
    monkeypatch.setenv("COMOL_KERNEL", kernel)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(mixing, "HAS_TRITON", has_triton)
    with pytest.raises(UserError) as caught:
        takes_triton(on, SINGLE, rank)
    assert str(caught.value) == message


def test_the_environment_is_read_at_every_call(monkeypatch):
    h, p, cores = torch.randn(3, 4), torch.rand(3, 2), torch.randn(2, 4, 4)
    monkeypatch.setenv("COMOL_KERNEL", "torch")
    mix_cores(h, p, cores, 1.0)
    monkeypatch.setenv("COMOL_KERNEL", "numpy")
    with pytest.raises(UserError, match="COMOL_KERNEL=numpy"):
        mix_cores(h, p, cores, 1.0)


@pytest.mark.slow
def test_without_triton_everything_imports_and_mixes_in_torch():
    code = """
import sys
sys.modules["triton"] = None
import torch
from comol_ds.adapters import mixing_triton, tile_tuning
from comol_ds.adapters.mixing import HAS_TRITON, mix_cores
o = mix_cores(torch.ones(1, 2), torch.ones(1, 3), torch.ones(3, 2, 2), 0.5)
assert (mixing_triton.triton, HAS_TRITON, o.tolist()) == (None, False, [[3.0, 3.0]])
"""
    environment = {name: value for name, value in os.environ.items() if name != "COMOL_KERNEL"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
