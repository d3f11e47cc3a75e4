"""Adapter folders between TP2 x DP2 under ZeRO-3 and one process: the same logits, the same bytes."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from comol_ds.adapters.adapter_folder import write_adapter
from comol_ds.parallel.assemble import attach_adapter
from comol_ds.parallel.zero_partition import adapter_state_dict
from tests.distributed.equality_cases import variation
from tests.distributed.launching import run_deepspeed
from tests.distributed.one_process import TOLERANCE, relative
from tests.tiny_models import random_batch, save_tiny_model

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.parametrize("router", ["core", "input"])]


def base_model(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder / "llama", dtype=torch.float32)


def write_random_adapter(folder: Path, router: str) -> None:
    """Every tensor random, B too, in a folder written by one process."""
    settings = variation(router=router).run_config(str(folder)).adapter
    model = attach_adapter(base_model(folder), settings, seed=3)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in trainable.values():
            parameter.normal_(std=0.2)
    write_adapter(adapter_state_dict(model, trainable), model.peft_config["default"], folder / f"given_{router}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, extensions):
    folder = tmp_path_factory.mktemp("transfer")
    save_tiny_model(folder / "llama")
    for router in ("core", "input"):
        write_random_adapter(folder, router)
    run = run_deepspeed(4, Path(__file__).parent / "transfer_worker.py", [str(folder), str(folder)], extensions)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return folder


def logits_in_one_process(folder: Path, adapter: str | None) -> torch.Tensor:
    model = base_model(folder)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(folder / adapter))
    batch = random_batch(4, seed=99)
    with torch.no_grad():
        return model.eval()(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits


def test_one_process_loads_what_was_trained(router, folder):
    found = torch.load(folder / "logits.pt")[f"saved_{router}"]
    assert relative(found, logits_in_one_process(folder, f"saved_{router}")) <= TOLERANCE
    untrained = logits_in_one_process(folder, None)
    assert relative(found, untrained) > 0.01, "three steps have changed the model"


def test_training_starts_from_what_one_process_wrote(router, folder):
    found = torch.load(folder / "logits.pt")[f"given_{router}"]
    assert relative(found, logits_in_one_process(folder, f"given_{router}")) <= TOLERANCE


def test_saving_writes_the_bytes_of_one_process(router, folder):
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        written, given = (folder / f"{kind}_{router}" / name for kind in ("again", "given"))
        assert written.read_bytes() == given.read_bytes(), name
