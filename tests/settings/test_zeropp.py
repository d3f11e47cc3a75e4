"""ZeRO++ settings that a world or a machine cannot run, and the files of ds_configs/."""

import json
from pathlib import Path

import pytest
from deepspeed.accelerator import get_accelerator

from comol_ds.config import OptimizerSettings, ParallelSettings, RunConfig
from comol_ds.ds_config import load_ds_json, resolve_ds_config, tensor_parallel_size, zero_stage
from comol_ds.errors import UserError
from comol_ds.layout import plan_batches
from comol_ds.parallel.groups import World
from comol_ds.parallel.zero_config import check_hpz, check_quantized, check_weight_storage, check_zero_block

FILES = sorted((Path(__file__).resolve().parents[2] / "ds_configs").glob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_of_ds_configs_is_accepted(path):
    """By our own checks and by DeepSpeed's, on a node of eight."""
    template = load_ds_json(str(path))
    config = RunConfig(
        optimizer=OptimizerSettings(per_device_train_batch_size=2, global_batch_size=16),
        parallel=ParallelSettings(tensor_parallel_size=tensor_parallel_size(template, None)),
    )
    batches = plan_batches(8 // config.parallel.tensor_parallel_size, 2, 16)
    resolved = resolve_ds_config(template, config, batches, bf16=zero_stage(template) > 0)
    check_zero_block(resolved)
    assert resolved["train_batch_size"] == 16
    assert "auto" not in json.dumps(resolved)


@pytest.mark.parametrize(("size", "local_size"), [(8, 8), (2, 4), (1, 3), (0, 3)])
def test_hpz_groups_within_a_node(size, local_size):
    block = {"zero_optimization": {"zero_hpz_partition_size": size}}
    assert check_hpz(block, World(0, 8, 0, local_size)) is None


def test_hpz_groups_on_two_nodes_are_refused():
    with pytest.raises(UserError) as error:
        check_hpz({"zero_optimization": {"zero_hpz_partition_size": 8}}, World(0, 8, 0, 4))
    assert str(error.value) == (
        "DeepSpeed JSON: zero_optimization.zero_hpz_partition_size = 8 does not divide the 4 ranks of a node, within"
        " which it keeps a second copy; use 4 or remove it"
    )


@pytest.mark.parametrize("key", ["weights", "gradients"])
def test_quantized_communication_needs_a_gpu(key, monkeypatch):
    block = {"zero_optimization": {f"zero_quantized_{key}": True}}
    monkeypatch.setattr(get_accelerator(), "device_name", lambda *_: "cuda")
    check_quantized(block)
    monkeypatch.setattr(get_accelerator(), "device_name", lambda *_: "cpu")
    with pytest.raises(UserError) as error:
        check_quantized(block)
    assert str(error.value) == (
        f"DeepSpeed JSON: zero_optimization.zero_quantized_{key} needs DeepSpeed's CUDA kernels and this machine has no"
        " GPU; remove it"
    )


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            {"zero_quantized_nontrainable_weights": True},
            "zero_quantized_nontrainable_weights is refused: DeepSpeed 0.19 quantizes float16 weights only, and runs"
            " are bfloat16 or float32; remove it",
        ),
        (
            {"offload_param": {"device": "nvme", "nvme_path": "/tmp"}},
            "offload_param.device = 'nvme' is not supported: weights are read straight into memory; use 'cpu'",
        ),
    ],
    ids=str,
)
def test_weights_kept_as_no_run_can(block, message):
    with pytest.raises(UserError) as error:
        check_weight_storage({"zero_optimization": block})
    assert str(error.value) == f"DeepSpeed JSON: zero_optimization.{message}"


def test_weights_on_the_host_are_accepted():
    for offload in ({"device": "cpu"}, None):
        assert check_weight_storage({"zero_optimization": {"offload_param": offload}}) is None
