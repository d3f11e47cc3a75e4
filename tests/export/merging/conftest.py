"""Bases and an update for the tests of the streamed merge."""

import shutil
from pathlib import Path

import pytest

from comol_ds.export.static_lora import StaticLora
from tests.export.merging.merge_bases import random_update, save_base, tensors_of


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("stored"))


@pytest.fixture
def base(stored, tmp_path) -> Path:
    """A bf16 Llama in shards that a test may change."""
    return shutil.copytree(stored, tmp_path / "base")


@pytest.fixture
def single(tmp_path) -> Path:
    """A bf16 Llama in one file that a test may change."""
    return save_base(tmp_path / "single", shards=False)


@pytest.fixture
def static(stored) -> StaticLora:
    return random_update(tensors_of(stored))
