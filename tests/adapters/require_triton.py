"""What a test that needs triton does without it."""

import importlib.util
import os

import pytest


def require_triton() -> None:
    """Skip the test, or fail it if COMOL_REQUIRE_ALL=1."""
    if importlib.util.find_spec("triton") is None:
        message = "missing: triton, which the extra [test] installs"
        if os.environ.get("COMOL_REQUIRE_ALL") == "1":
            pytest.fail(message)
        pytest.skip(message)
