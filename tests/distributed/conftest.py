"""DeepSpeed's CPU op is compiled once per test run, in one process, before any ranks start."""

import subprocess
import sys

import pytest

from tests.distributed.launching import clean_environment


@pytest.fixture(scope="session")
def extensions(tmp_path_factory):
    """A TORCH_EXTENSIONS_DIR of this test run with the op in it."""
    folder = tmp_path_factory.mktemp("torch_extensions")
    build = (
        "from deepspeed.accelerator import get_accelerator as g; g().create_op_builder('ShareMemCommBuilder').load()"
    )
    subprocess.run(
        [sys.executable, "-c", build], env=clean_environment(folder), check=True, capture_output=True, timeout=240
    )
    return folder
