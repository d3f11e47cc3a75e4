"""The recipes of launch/: they parse, and their heads hold what the planner says of them today."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from comol_ds.config_parser import parse_run_config
from comol_ds.ds_config import load_ds_json, tensor_parallel_size, zero_stage

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPES = REPOSITORY / "launch" / "recipes"
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "max_position_embeddings": 8192, "num_key_value_heads": 8, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_8B = LLAMA | {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32
}  # fmt: skip
LLAMA_70B = LLAMA | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80
}  # fmt: skip


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_parse(path):
    config = parse_run_config(["--config", str(path), "--dataset", "train.jsonl"])
    assert config.model.bf16 and config.model.activation_checkpointing == "full"
    template = load_ds_json(str(REPOSITORY / config.run.ds_config))
    assert zero_stage(template) == (1 if "8b" in path.stem else 3)
    assert tensor_parallel_size(template, None) == (2 if "tp2" in path.stem else 1)


def recipe(name: str, geometry: dict, *words: str, mark: pytest.MarkDecorator = pytest.mark.exhaustive):
    return pytest.param(name, geometry, ["--world_size", *words], marks=mark, id=name)


@pytest.mark.parametrize(
    ("name", "geometry", "world"),
    [
        recipe("llama3.1_8b_1gpu", LLAMA_8B, "1"),
        recipe("llama3.1_70b_8x80gb", LLAMA_70B, "8", mark=pytest.mark.slow),
        recipe("llama3.1_70b_8x80gb_tp2", LLAMA_70B, "8"),
        recipe("llama3.1_70b_4nodes", LLAMA_70B, "32", "--nodes", "4"),
    ],
)
def test_the_head_of_a_recipe_is_what_the_planner_says(name, geometry, world, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(geometry))
    path = RECIPES / f"{name}.yaml"
    words = ["--config", str(path), "--model_name_or_path", str(tmp_path), "--dataset", "train.jsonl", *world]
    planned = subprocess.run(
        [sys.executable, str(REPOSITORY / "launch" / "plan.py"), *words],
        cwd=REPOSITORY, check=True, capture_output=True, text=True, timeout=120,
    ).stdout.splitlines()  # fmt: skip
    first = next(number for number, line in enumerate(planned) if line.startswith("memory per rank"))
    last = next(number for number, line in enumerate(planned) if line.startswith("while loading"))
    head = [line.removeprefix("#   ") for line in path.read_text().splitlines() if line.startswith("#   ")]
    for line in [*planned[first : last + 1], planned[-1]]:
        assert line in head
