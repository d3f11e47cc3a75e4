"""A checkpoint that does not say how its prompts were written is not continued with others without a word."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from comol_ds.config import DataSettings, ModelSettings, RunConfig
from comol_ds.data.prepare import DataReport
from comol_ds.data.templates import resolve_template
from comol_ds.errors import UserError
from comol_ds.parallel.groups import World
from comol_ds.training.content import identify_content
from comol_ds.training.identity import identify
from comol_ds.training.run_folder import RunFolder
from tests.committed_files import commit_files
from tests.data.data_helpers import tiny_tokenizer


def continued(folder, wanted=None, data_format="alpaca", chat=True, says_template=False):
    """What the run of a base looks at that continues a checkpoint."""
    config = RunConfig(
        model=ModelSettings(model_name_or_path="m", init_random=True, bf16=False),
        data=DataSettings(dataset=["x.jsonl"], prompt_template=wanted),
    )
    config.optimizer.global_batch_size, config.parallel.tensor_parallel_size = 8, 1
    identity = identify(config, World(0, 1, 0), {"zero_optimization": {"stage": 0}})
    stored = asdict(identity)
    if not says_template:
        del stored["data"]["prompt_template"]
    checkpoint = commit_files(
        folder / "checkpoints", 7, {"state.json": json.dumps({"step": 7, "identity": stored, "router_losses": {}})}
    )
    plan = SimpleNamespace(
        config=config, world=World(0, 1, 0), identity=identity, folder=RunFolder(str(folder)),
        resume=SimpleNamespace(path=checkpoint),
    )  # fmt: skip
    template = resolve_template(tiny_tokenizer(chat=chat), wanted, {data_format: "x.jsonl"})
    return checkpoint, lambda: identify_content(plan, SimpleNamespace(report=DataReport(64), template=template))


@pytest.mark.parametrize("data_format", ["alpaca", "question_answer", "prompt_completion"])
def test_prompts_that_a_chat_template_would_write_now_are_asked_about(data_format, tmp_path):
    checkpoint, look = continued(tmp_path, data_format=data_format)
    with pytest.raises(UserError) as error:
        look()
    assert str(error.value) == (
        f"checkpoint {checkpoint} was written before chat templates were the default; give --prompt_template alpaca"
        " (instructions, questions) or none (prompts) to go on with the prompts that it was trained with, or chat to"
        " change them"
    )


@pytest.mark.parametrize(
    "given",
    [
        {"wanted": "alpaca"},
        {"wanted": "none", "data_format": "prompt_completion"},
        {"wanted": "chat"},
        {"data_format": "messages"},
        {"data_format": "text"},
        {"chat": False},
        {"says_template": True},
    ],
    ids=str,
)
def test_prompts_that_stay_or_were_asked_for_continue(given, tmp_path):
    _, look = continued(tmp_path, **given)
    assert look().data["prompt_template"] == given.get("wanted")
