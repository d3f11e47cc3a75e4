"""Hints for names that are not ours: what they mean here, and none where the likeness is chance."""

import re

import pytest

from comol_ds.config import RunConfig
from comol_ds.flag_aliases import _HINTS, _OTHER, _SAME, unknown_name

KNOWN = {*RunConfig().flat(), "config"}


def test_every_hint_names_flags_that_exist_for_a_name_that_does_not():
    names = [name for group in (*_SAME.values(), *_OTHER) for name in group]
    assert sorted(names) == sorted(_HINTS), "a name stands in the table twice"
    assert not (set(names) & KNOWN) - {"config"}  # known as a flag, and unknown in a YAML file
    for name in names:
        hint = unknown_name(name, KNOWN - {name})
        assert "{" not in hint and set(re.findall(r"--(\w+)", hint)) <= KNOWN, name
    assert set(_SAME) <= KNOWN


HINTS = [
    ("lora_rank", "it is --r here"),
    ("cutoff_len", "it is --max_length here"),
    ("deepspeed", "it is --ds_config here"),
    ("gradient_checkpointing", "it is --activation_checkpointing here"),
    ("lora_target", "it is --target_modules here"),
    ("load_in_4bit", "a quantized base is not supported; use the float32, bfloat16 or float16 weights"),
    ("gradient_accumulation_steps", "accumulation follows from --global_batch_size"),
    ("warmup_ratio", "give --warmup_steps, a number of optimizer steps"),
    ("lerning_rate", "the nearest known name is --learning_rate"),
    ("gradient_acumulation_steps", "if gradient_accumulation_steps is meant, accumulation follows from"),
]


@pytest.mark.parametrize(("name", "hint"), HINTS, ids=[name for name, _ in HINTS])
def test_hint(name, hint):
    assert unknown_name(name, KNOWN).startswith(hint)


# settings of other programs that have no relative here; with a cutoff of 0 difflib has a guess for each
@pytest.mark.parametrize(
    "name", ["mask_history", "liger", "neftune_noise_alpha", "torch_compile", "plot_loss", "x", ""]
)
def test_no_hint_where_the_likeness_is_chance(name):
    assert unknown_name(name, KNOWN) == "see --help"


def test_a_yaml_key_has_no_dashes():
    assert unknown_name("lora_r", KNOWN, mark="") == "it is r here"
    assert unknown_name("max_lenght", KNOWN, mark="") == "the nearest known name is max_length"
