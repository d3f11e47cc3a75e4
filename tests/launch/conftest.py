"""One tiny model for all tests of the launcher; every test has its own folder, cache and environment."""

import os

import datasets
import pytest

from tests.data.data_helpers import sums, write_jsonl
from tests.launch.launcher_calls import Inputs, refused
from tests.tiny_models import save_tiny_model


@pytest.fixture(scope="package")
def tiny_model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def inputs(tiny_model, tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets_cache"))
    # the launcher sets the rendezvous variables of a world of one, which no other test may inherit
    inherited = dict(os.environ)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    yield Inputs(tiny_model, write_jsonl(tmp_path / "records.jsonl", sums(40)), tmp_path)
    os.environ.clear()
    os.environ.update(inherited)


@pytest.fixture
def message(inputs, capfd, monkeypatch):
    """Calls the launcher with changed flags and returns why it refused them."""
    return lambda *extra, **changes: refused(inputs, capfd, monkeypatch, inputs.argv(*extra, **changes))
