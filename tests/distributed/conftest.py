"""What is made once per test run: DeepSpeed's CPU op, in one process, before any ranks start, and the tiny models."""

import subprocess
import sys

import pytest

from tests.distributed.launching import clean_environment
from tests.tiny_models import FAMILIES, save_attention_plan, save_tiny_model


@pytest.fixture(scope="session")
def extensions(tmp_path_factory):
    """A TORCH_EXTENSIONS_DIR of this test run with the op in it."""
    folder = tmp_path_factory.mktemp("torch_extensions")
    build = (
        "from deepspeed.accelerator import get_accelerator as g; g().create_op_builder('ShareMemCommBuilder').load()"
    )
    subprocess.run(
        [sys.executable, "-c", build], env=clean_environment(folder), check=True, capture_output=True, timeout=540
    )
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder with a model of every family, and a plan file."""
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        save_tiny_model(folder / family, family)
    save_attention_plan(folder)
    return folder
