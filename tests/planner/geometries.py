"""Model folders that hold a config.json and no weights, and runs of them."""

import json
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, PretrainedConfig

from comol_ds.config_parser import parse_run_config
from comol_ds.planner.command import DEFAULTS
from comol_ds.planner.request import Request, resolve

REPOSITORY = Path(__file__).resolve().parents[2]
LLAMA_SMALL = LlamaConfig(
    vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=8, num_attention_heads=32,
    num_key_value_heads=4,
)  # fmt: skip


def save_config(config: PretrainedConfig, folder: Path) -> str:
    """A model folder without weights, whose config.json names the architecture."""
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    return str(folder)


def template(stage: int, /, **zero: Any) -> dict[str, Any]:
    """ds_configs/zero<stage>.json with some ZeRO settings changed."""
    found = json.loads((REPOSITORY / "ds_configs" / f"zero{stage}.json").read_text())
    found["zero_optimization"] |= zero
    return found


def request(model: str, world_size: int, ds_json: dict[str, Any], *flags: Any, nodes: int = 1) -> Request:
    """What launch/plan.py would resolve."""
    argv = ["--model_name_or_path", model, "--ds_config", "unread.json", *map(str, flags)]
    return resolve(parse_run_config(argv, DEFAULTS), ds_json, world_size, nodes)
