"""DeepSpeed JSON and run settings to the resolved dictionary."""

import copy
from pathlib import Path

import pytest

from comol_ds.config import ModelSettings, OptimizerSettings, RunConfig
from comol_ds.ds_config import load_ds_json, resolve_ds_config, zero_stage
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


def resolve(template: dict, bf16: bool = False, max_grad_norm: float = 1.0) -> dict:
    config = RunConfig(model=ModelSettings(bf16=bf16), optimizer=OptimizerSettings(max_grad_norm=max_grad_norm))
    return resolve_ds_config(template, config, BATCHES, bf16)


def autos(value) -> int:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (value == "auto") + sum(autos(item) for item in items)


def test_the_stages_are_all_there():
    stages = {path.stem: zero_stage(load_ds_json(str(path))) for path in FILES}
    assert (stages["zero1"], stages["zero2"], stages["zero3"], stages["zero3_offload"]) == (1, 2, 3, 3)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("bf16", [False, True])
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


@pytest.mark.parametrize("stage", [0, 4, -1, "3", True, None])
def test_unknown_stage(stage):
    with pytest.raises(UserError, match=r"zero_optimization.stage is .*; use 1, 2 or 3"):
        zero_stage({"zero_optimization": {"stage": stage}})


@pytest.mark.parametrize("config", [{}, {"zero_optimization": {}}])
def test_no_zero_block_is_stage_0(config):
    with pytest.raises(UserError, match=r"zero_optimization.stage is 0; use 1, 2 or 3"):
        zero_stage(config)


def test_a_misspelled_key_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="unknown key 'gradient_cliping'; the nearest known key is 'gradient_clipping'"):
        resolve({**ZERO, "gradient_cliping": 1.0})
