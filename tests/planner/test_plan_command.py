"""launch/plan.py: what it prints, and what it refuses on one line."""

import importlib.util
import json

import pytest

from comol_ds.planner.report import WIDTH
from tests.planner.geometries import LLAMA_SMALL, REPOSITORY, save_config, template

spec = importlib.util.spec_from_file_location("launch_plan", REPOSITORY / "launch" / "plan.py")
launcher = importlib.util.module_from_spec(spec)
spec.loader.exec_module(launcher)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_config(LLAMA_SMALL, tmp_path_factory.mktemp("model"))


@pytest.fixture
def flags(model):
    """A run that can be planned."""
    return {
        "model_name_or_path": model,
        "ds_config": f"{REPOSITORY}/ds_configs/zero3.json",
        "world_size": 8,
        "per_device_train_batch_size": 2,
        "max_length": 512,
    }


@pytest.fixture
def call(flags, capsys):
    """Calls the command with some flags changed; returns its exit code, output and errors."""

    def run(*extra: str, **changes) -> tuple[int, str, str]:
        given = {name: value for name, value in (flags | changes).items() if value is not None}
        capsys.readouterr()
        code = launcher.main([*(str(word) for name, value in given.items() for word in (f"--{name}", value)), *extra])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


REFUSED = [
    ({"world_size": None}, "the following arguments are required: --world_size; see --help"),
    ({"world_size": 0}, "--world_size 0: must be positive"),
    ({"world_size": "eight"}, "argument --world_size: invalid int value: 'eight'; see --help"),
    ({"device_memory_gb": -1}, "--device_memory_gb -1.0: must be positive"),
    ({"nodes": 3}, "--nodes 3 does not divide --world_size 8; use 1, 2, 4 or 8"),
    ({"max_lenght": 8}, "unknown flag --max_lenght; the nearest known name is --max_length"),
    ({"ds_config": None}, "--ds_config is missing; give a DeepSpeed JSON, for example ds_configs/zero3.json"),
    ({"ds_config": "no.json"}, "--ds_config no.json: No such file or directory; ds_configs/ has working examples"),
    ({"r": 0}, "--r 0: must be a positive whole number"),
    (
        {"world_size": 3, "tensor_parallel_size": 2},
        "--tensor_parallel_size 2 does not divide the world of 3 ranks; use 1 or 3, or start a multiple of 2 ranks",
    ),
    (
        {"nodes": 4, "tensor_parallel_size": 4},
        "--tensor_parallel_size 4 is more than the 2 ranks of a node; use 1 or 2, or accept the slower links between"
        " nodes with --allow_cross_node_tp",
    ),
    ({"tensor_parallel_size": 8}, "--tensor_parallel_size 8 does not divide num_key_value_heads = 4; use 2 or 4"),
    (
        {"partition_activations": "true", "activation_checkpointing": "full"},
        "--partition_activations: there are no tensor-parallel ranks to divide the layers' inputs between; set"
        " --tensor_parallel_size, or drop it",
    ),
    (
        {"global_batch_size": 20},
        "--global_batch_size 20 is not a multiple of --per_device_train_batch_size 2 x 8 data-parallel ranks = 16; use"
        " 16 or 32",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=str)
def test_bad_input_is_refused_on_one_line(changes, message, call):
    code, output, errors = call(**changes)
    assert (code, output) == (2, "")
    assert errors == f"plan.py: error: {message}\n"


@pytest.mark.parametrize(
    ("block", "start"),
    [
        ({"zero_quantized_nontrainable_weights": True}, "zero_quantized_nontrainable_weights is refused: DeepSpeed"),
        ({"offload_param": {"device": "nvme"}}, "offload_param.device = 'nvme' is not supported: weights are read"),
    ],
    ids=str,
)
def test_a_json_that_the_trainer_refuses_is_not_planned(block, start, call, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(template(3, **block)))
    code, output, errors = call(ds_config=path)
    assert (code, output) == (2, "")
    assert errors.startswith(f"plan.py: error: DeepSpeed JSON: zero_optimization.{start}")
    assert errors.count("\n") == 1


def test_communication_that_only_this_machine_cannot_run_is_planned(call, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(template(3, zero_quantized_gradients=True)))
    assert call(ds_config=path)[0] == 0


def test_targets_that_match_nothing_are_refused(call):
    code, _, errors = call(target_modules="q_porj")
    assert code == 2
    assert errors.startswith("plan.py: error: target_modules q_porj match no module of the model; near it: q_proj")
    assert errors.count("\n") == 1


def test_text_fits_a_hundred_columns_and_names_the_layout(call):
    code, output, _ = call(nodes=2, tensor_parallel_size=2, activation_checkpointing="full")
    lines = output.splitlines()
    assert code == 0
    assert max(map(len, lines)) <= WIDTH == 100
    assert "8 ranks, 2 x 4 on each node: 2 tensor-parallel x 4 data-parallel, ZeRO stage 3, bfloat16" in lines
    assert "batches: 2 micro x 1 accumulation x 4 data-parallel = 8 global; rows of 512 tokens" in lines
    assert lines[-1].startswith("fits: ")
    assert lines[-1].endswith(" of 72.00 GiB (80.00 GiB less 10% for context and NCCL)")


def test_text_names_the_nearest_change(call):
    code, output, _ = call(device_memory_gb=3, per_device_train_batch_size=8)
    lines = output.splitlines()
    assert code == 0
    missing = next(index for index, line in enumerate(lines) if line.startswith("does not fit: "))
    assert lines[missing + 1].startswith("nearest change that fits, with ")
    assert lines[missing + 2 :] == ["  --activation_checkpointing full"]


def test_json_says_the_same_in_bytes(call):
    code, output, _ = call("--json", tensor_parallel_size=2)
    report = json.loads(output)
    assert code == 0
    assert {name: type(value) for name, value in report.items()} == {
        "layout": dict,
        "parameters": dict,
        "device_bytes": dict,
        "host_bytes": dict,
        "loading_bytes": dict,
        "saved_activations_bytes": dict,
        "communication_per_step": list,
        "device_memory_bytes": int,
        "available_bytes": int,
        "fits": bool,
        "nearest_change": type(None),
    }
    assert set(report["device_bytes"]) == {
        "frozen_weights", "adapter", "gradients", "optimizer_master", "optimizer_moments", "gathered_weights",
        "saved_by_layers", "saved_by_head_and_loss", "masks_and_positions", "working_tensors", "gradient_buckets",
        "update_temporaries", "peak",
    }  # fmt: skip
    assert all(type(nbytes) is int for nbytes in report["device_bytes"].values())
    assert list(report["saved_activations_bytes"]) == ["none", "selective:2", "full"]
    for traffic in report["communication_per_step"]:
        assert set(traffic) == {"kind", "collectives", "nbytes", "sent"}
    assert report["layout"]["data_parallel"] == 4


@pytest.mark.slow
def test_offload_moves_terms_to_the_host(call):
    whole, offloaded = (
        json.loads(call("--json", ds_config=f"{REPOSITORY}/ds_configs/{name}.json", **changes)[1])
        for name, changes in (("zero3", {}), ("zero3_offload", {"activation_offload": "cpu"}))
    )
    for name in ("frozen_weights", "adapter", "optimizer_master", "optimizer_moments"):
        assert offloaded["device_bytes"][name] == 0
        assert offloaded["host_bytes"][name] == whole["device_bytes"][name]
    assert offloaded["device_bytes"]["saved_by_layers"] < 0.05 * whole["device_bytes"]["saved_by_layers"]
    assert offloaded["host_bytes"]["saved_by_layers"] > 0.9 * whole["device_bytes"]["saved_by_layers"]
    assert offloaded["host_bytes"]["per_node"] == 8 * offloaded["host_bytes"]["per_rank"]


@pytest.mark.slow
def test_partitioned_activations_are_divided_between_tensor_parallel_ranks(call):
    kept = [
        json.loads(call("--json", tensor_parallel_size=4, activation_checkpointing="full", **changes)[1])
        for changes in ({}, {"partition_activations": "true"})
    ]
    first, second = (report["device_bytes"]["saved_by_layers"] for report in kept)
    assert second == first // 4


def test_without_a_model_the_embedded_default_is_planned(call):
    code, output, _ = call(model_name_or_path=None, per_device_train_batch_size=None, max_length=None)
    assert code == 0
    assert "32 micro x 1 accumulation x 8 data-parallel = 256 global; rows of 64 tokens" in output
