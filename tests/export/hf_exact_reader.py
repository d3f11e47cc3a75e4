"""Loads hf-exact checkpoints where neither comol_ds nor peft can be imported. Run with python -I: JOB RESULTS.

JOB is JSON: {"folders": [...], "input_ids": [[...]], "scratch": an empty folder}. RESULTS is torch.save of one dict per
folder: logits; tokens generated greedily after the first three; problems of loading; dtypes by parameter; and, of the
model saved with save_pretrained and loaded again, the names in its files and its logits.
"""

import json
import sys
from pathlib import Path

import torch


class Without:
    """A finder of modules that does not find what a reader of the checkpoint lacks."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in ("comol_ds", "peft") else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):  # it also finds distributions
        return getattr(self.finder, name)


def main(job_path: str, results_path: str) -> None:
    sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
    assert not {"comol_ds", "peft"} & sys.modules.keys()
    job = json.loads(Path(job_path).read_text())
    input_ids = torch.tensor(job["input_ids"])
    results = [read(folder, input_ids, Path(job["scratch"], str(n))) for n, folder in enumerate(job["folders"])]
    torch.save(results, results_path)


def read(folder: str, input_ids: torch.Tensor, again: Path) -> dict:
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, problems = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    model.eval().save_pretrained(again)
    with safe_open(again / "model.safetensors", framework="pt") as file:
        saved_names = list(file.keys())
    second = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True).eval()
    with torch.no_grad():
        generated = model.generate(input_ids[:, :3], max_new_tokens=5, do_sample=False)
        return {
            "logits": model(input_ids=input_ids).logits,
            "generated": generated,
            "problems": {kind: sorted(names) for kind, names in problems.items()},
            "dtypes": {name: str(parameter.dtype) for name, parameter in model.named_parameters()},
            "saved_names": saved_names,
            "logits_again": second(input_ids=input_ids).logits,
            "text": AutoTokenizer.from_pretrained(folder).decode(generated[0]),
        }


if __name__ == "__main__":
    main(*sys.argv[1:])
