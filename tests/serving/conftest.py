"""Tests marked `serving` need vLLM, which has an environment of its own: its torch is not the tests'."""

import os

import pytest

from tests.serving.vllm_offline import vllm_python


@pytest.hookimpl(tryfirst=True)  # before any fixture builds a model
def pytest_runtest_setup(item):
    python = vllm_python()
    if item.get_closest_marker("serving") is None or python.exists():
        return
    message = f"vLLM's environment is missing: {python} does not exist (COMOL_VLLM_PYTHON names another)"
    if os.environ.get("COMOL_REQUIRE_ALL") == "1":
        pytest.fail(message)
    pytest.skip(message)
