"""DeepSpeed JSON and run settings to the resolved dictionary."""

import copy
from pathlib import Path

import pytest

from comol_ds.config import ModelSettings, OptimizerSettings, ParallelSettings, RunConfig
from comol_ds.ds_config import load_ds_json, resolve_ds_config, tensor_parallel_size, zero_stage
from comol_ds.errors import UserError
from comol_ds.layout import BatchLayout

FILES = sorted((Path(__file__).resolve().parents[2] / "ds_configs").glob("*.json"))
BATCHES = BatchLayout(data_parallel=2, micro_batch=4, accumulation=3)
ZERO = {"zero_optimization": {"stage": 3}}
AUTO = {
    **ZERO,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
}


def resolve(template: dict, bf16: bool = False, max_grad_norm: float = 1.0, tensor_parallel: int | None = None) -> dict:
    config = RunConfig(
        model=ModelSettings(bf16=bf16),
        optimizer=OptimizerSettings(max_grad_norm=max_grad_norm),
        parallel=ParallelSettings(tensor_parallel_size=tensor_parallel),
    )
    return resolve_ds_config(template, config, BATCHES, bf16)


def autos(value) -> int:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (value == "auto") + sum(autos(item) for item in items)


def test_the_stages_are_all_there():
    stages = {path.stem: zero_stage(load_ds_json(str(path))) for path in FILES}
    assert (stages["zero1"], stages["zero2"], stages["zero3"], stages["zero3_offload"]) == (1, 2, 3, 3)


@pytest.mark.parametrize(
    ("path", "bf16"),
    [(path, bf16) for path in FILES for bf16 in (False, True) if not (bf16 and path.stem == "zero0")],
    ids=lambda value: getattr(value, "stem", value),
)
def test_every_shipped_file_resolves(path, bf16):
    template = load_ds_json(str(path))
    before = copy.deepcopy(template)
    resolved = resolve(template, bf16, max_grad_norm=0.5)
    assert template == before
    assert autos(template) and not autos(resolved)
    assert (resolved["train_batch_size"], resolved["train_micro_batch_size_per_gpu"]) == (24, 4)
    assert (resolved["gradient_accumulation_steps"], resolved["gradient_clipping"]) == (3, 0.5)
    assert resolved["bf16"]["enabled"] is bf16
    assert resolved["zero_optimization"] == template["zero_optimization"]
    assert "tensor_parallel" not in resolved


@pytest.mark.parametrize("path", [path for path in FILES if "zero3" in path.stem], ids=lambda path: path.stem)
def test_small_parameters_are_gathered_with_their_layer(path):
    # above the threshold ZeRO-3 keeps or gathers them one by one
    assert load_ds_json(str(path))["zero_optimization"]["stage3_param_persistence_threshold"] == 0


def test_what_is_left_out_is_filled_like_auto():
    for template in (ZERO, AUTO, {**ZERO, "bf16": {}}):
        resolved = resolve(template)
        assert resolved["train_batch_size"] == 24 and resolved["bf16"] == {"enabled": False}
        assert resolved["zero_allow_untested_optimizer"] is True


def test_a_value_that_agrees_with_the_run_stays():
    template = ZERO | {
        "train_batch_size": 24,
        "gradient_clipping": 1,
        "bf16": {"enabled": False},
        "wall_clock_breakdown": True,
    }
    assert resolve(template)["gradient_clipping"] == 1.0
    assert resolve(template)["wall_clock_breakdown"] is True


@pytest.mark.parametrize(
    ("block", "fragments"),
    [
        ({"train_batch_size": 16}, ["train_batch_size = 16", "--global_batch_size = 24"]),
        (
            {"train_micro_batch_size_per_gpu": 8},
            ["train_micro_batch_size_per_gpu = 8", "--per_device_train_batch_size = 4"],
        ),
        ({"gradient_accumulation_steps": 1}, ["gradient_accumulation_steps = 1", "= 3"]),
        ({"gradient_clipping": 0.0}, ["gradient_clipping = 0.0", "--max_grad_norm = 1.0"]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled = True", "--bf16 = False"]),
        ({"bf16": "auto"}, ["'bf16' must be an object, found 'auto'"]),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}},
            ['zero_optimization.reduce_bucket_size is "auto"'],
        ),
        ({"aio": [{"b": "auto"}]}, ['aio.0.b is "auto"']),
        ({"elasticity": {"enabled": True}}, ["'elasticity' is refused", "remove the block"]),
        ({"optimizer": {"type": "Adam"}}, ["'optimizer' is refused", "--optim"]),
        ({"scheduler": {}}, ["'scheduler' is refused", "--lr_scheduler_type"]),
        ({"fp16": {"enabled": True}}, ["'fp16' is refused", "--bf16 true"]),
        ({"amp": {"enabled": True}}, ["'amp' is refused", "--bf16 true"]),
    ],
    ids=str,
)
def test_contradictions_name_both_values(block, fragments):
    template = AUTO | block
    before = copy.deepcopy(template)
    with pytest.raises(UserError) as error:
        resolve(template)
    assert template == before
    assert all(fragment in str(error.value) for fragment in fragments), error.value
    assert "\n" not in str(error.value)


def test_a_refused_block_that_is_switched_off_is_dropped():
    resolved = resolve({**ZERO, "fp16": {"enabled": False}, "elasticity": {"enabled": False}})
    assert "fp16" not in resolved and "elasticity" not in resolved


@pytest.mark.parametrize("stage", [4, -1, "3", True, False, None])
def test_unknown_stage(stage):
    with pytest.raises(UserError, match=r"zero_optimization.stage is .*; use 0, 1, 2 or 3"):
        zero_stage({"zero_optimization": {"stage": stage}})


@pytest.mark.parametrize("config", [{}, {"zero_optimization": {}}, {"zero_optimization": {"stage": 0}}])
def test_no_zero_block_is_stage_0(config):
    assert zero_stage(config) == 0
    assert resolve(config)["zero_optimization"] == {"stage": 0}


def test_stage_0_is_refused_in_bfloat16():
    with pytest.raises(UserError) as error:
        resolve({}, bf16=True)
    assert str(error.value) == (
        "DeepSpeed JSON: zero_optimization.stage 0 with --bf16 true takes another optimizer of DeepSpeed, which is not"
        " tested; use stage 1: it computes the same, or --bf16 false"
    )


@pytest.mark.parametrize(
    ("block", "flag", "expected"),
    [
        (None, None, 1),
        (None, 4, 4),
        ({}, None, 1),
        ({"autotp_size": "auto"}, None, 1),
        ({"autotp_size": "auto"}, 2, 2),
        ({"autotp_size": 2}, None, 2),
        ({"autotp_size": 2}, 2, 2),
    ],
)
def test_tensor_parallel_size_stands_in_the_json_or_the_flag(block, flag, expected):
    template = AUTO if block is None else AUTO | {"tensor_parallel": block}
    before = copy.deepcopy(template)
    assert tensor_parallel_size(template, flag) == expected
    assert "tensor_parallel" not in resolve(template, tensor_parallel=flag)
    assert template == before


PLACEMENT = (
    "is refused: DeepSpeed's own placement of layers is not used; remove it, and where the model's own plan does not"
    " serve, give one with --tp_plan FILE"
)


@pytest.mark.parametrize(
    ("block", "flag", "message"),
    [
        (
            {"autotp_size": 2},
            4,
            "DeepSpeed JSON says tensor_parallel.autotp_size = 2, the run says --tensor_parallel_size = 4; write"
            ' "auto" in the JSON or make them agree',
        ),
        (
            {"autotp_size": 2},
            1,
            "DeepSpeed JSON says tensor_parallel.autotp_size = 2, the run says --tensor_parallel_size = 1; write"
            ' "auto" in the JSON or make them agree',
        ),
        (
            {"autotp_size": 0},
            None,
            'DeepSpeed JSON: tensor_parallel.autotp_size is 0; use a positive number or "auto"',
        ),
        (
            {"autotp_size": True},
            None,
            'DeepSpeed JSON: tensor_parallel.autotp_size is True; use a positive number or "auto"',
        ),
        (
            {"autotp_size": "2"},
            2,
            "DeepSpeed JSON: tensor_parallel.autotp_size is '2'; use a positive number or \"auto\"",
        ),
        (2, None, "DeepSpeed JSON: 'tensor_parallel' must be an object, found 2"),
        *(
            ({"autotp_size": 2, key: value}, None, f"DeepSpeed JSON: tensor_parallel.{key} {PLACEMENT}")
            for key, value in {
                "preset_model": "llama",
                "partition_config": {},
                "tp_overlap_comm": True,
                "dtype": "bf16",
                "vocab_parallel_lm_head": False,
                "enabled": False,
            }.items()
        ),
    ],
    ids=str,
)
def test_tensor_parallel_blocks_that_are_refused(block, flag, message):
    for ask in (tensor_parallel_size, lambda template, flag: resolve(template, tensor_parallel=flag)):
        with pytest.raises(UserError) as error:
            ask(AUTO | {"tensor_parallel": block}, flag)
        assert str(error.value) == message


UNTESTED = "the combination is not tested"
NORM = "gradients are summed over tensor-parallel ranks after the offload has taken their norm; use stage 3"


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        (
            {"stage": 3, "zero_hpz_partition_size": 2},
            "zero_hpz_partition_size = 2 is refused with tensor parallelism: its groups are consecutive ranks, which"
            " are tensor-parallel peers: their different weights would be mixed without an error; remove it",
        ),
        *(
            ({"stage": 3, key: True}, f"{key} = True is refused with tensor parallelism: {UNTESTED}; remove it")
            for key in ("zero_quantized_weights", "zero_quantized_gradients")
        ),
        (
            {"stage": 1, "offload_optimizer": {"device": "cpu"}},
            f"offload_optimizer to cpu at stage 1 is refused with tensor parallelism: {NORM}",
        ),
        (
            {"stage": 2, "offload_optimizer": {"device": "nvme"}},
            f"offload_optimizer to nvme at stage 2 is refused with tensor parallelism: {NORM}",
        ),
        (
            {"stage": 2, "cpu_offload": True},
            f"offload_optimizer to cpu at stage 2 is refused with tensor parallelism: {NORM}",
        ),
    ],
    ids=str,
)
def test_zero_options_that_are_refused_with_tensor_parallelism_only(zero, message):
    template = AUTO | {"zero_optimization": zero}
    assert resolve(template)["zero_optimization"] == zero
    assert resolve(template, tensor_parallel=1)["zero_optimization"] == zero
    for asked in ({"tensor_parallel": 2}, {"template": template | {"tensor_parallel": {"autotp_size": 2}}}):
        with pytest.raises(UserError) as error:
            resolve(**{"template": template} | asked)
        assert str(error.value) == f"DeepSpeed JSON: zero_optimization.{message}"


@pytest.mark.parametrize(
    "zero",
    [
        {"stage": 3, "zero_hpz_partition_size": 1, "zero_quantized_weights": False},
        {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
        {"stage": 2, "offload_optimizer": {"device": "none"}},
        {"stage": 1, "offload_optimizer": None, "cpu_offload": False},
        {"stage": 0},
    ],
    ids=str,
)
def test_zero_options_that_go_with_tensor_parallelism(zero):
    assert resolve(AUTO | {"zero_optimization": zero}, tensor_parallel=2)["zero_optimization"] == zero


def test_the_shipped_file_for_two_tensor_parallel_ranks_is_zero3_otherwise():
    files = {path.stem: load_ds_json(str(path)) for path in FILES}
    assert files["zero3_tp2"] == files["zero3"] | {"tensor_parallel": {"autotp_size": 2}}


def test_a_misspelled_key_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="unknown key 'gradient_cliping'; the nearest known key is 'gradient_clipping'"):
        resolve({**ZERO, "gradient_cliping": 1.0})
