"""One rank that trains a small run, and continues it in every way that a user may try. One engine after the other.

Usage: deepspeed continued_worker.py FOLDER, with the model llama and data.jsonl in it
"""

import json
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from comol_ds.checkpoint_names import MARKER
from comol_ds.config_parser import parse_run_config
from comol_ds.errors import UserError
from comol_ds.parallel import groups
from comol_ds.training.commit import _digest
from comol_ds.training.loop import run_all
from comol_ds.training.plan import plan_run
from comol_ds.training.preemption import StopRequests
from comol_ds.training.set_up import set_up

ROOT = Path(__file__).resolve().parents[2]
STEPS, MIDDLE = 4, 2
SETTINGS = {
    "ds_config": ROOT / "ds_configs" / "zero2.json", "max_steps": STEPS, "save_steps": MIDDLE, "max_length": 64,
    "per_device_train_batch_size": 4, "learning_rate": 1e-2, "lr_scheduler_type": "cosine", "logging_steps": 1,
    "max_generate_records": 0, "report_to": "none",
}  # fmt: skip


class Poison:
    """A pickle that leaves word when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = str(trace)

    def __reduce__(self) -> tuple:
        return Path.touch, (Path(self.trace),)


def start(folder: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """What launch/train.py does: whether the run is done, or why it is refused, and what it prints."""
    settings = SETTINGS | {"model_name_or_path": folder / "llama", "dataset": folder / "data.jsonl", "output_dir": out}
    words = [word for name, value in (settings | changes).items() for word in (f"--{name}", str(value))]
    printed, done, engine = StringIO(), None, None
    with redirect_stdout(printed):
        try:
            plan = plan_run(parse_run_config(words), groups.World(0, 1, 0))
            with StopRequests(out, plan.folder.checkpoints, plan.config.run, plan.world) as requests:
                state = set_up(plan, requests)
                engine = None if state is None else state.engine
                done = state is None or run_all(state)
        except UserError as error:
            done = str(error)
    if engine is not None:
        engine.destroy()
    return {"done": done, "printed": printed.getvalue(), "loaded": engine is not None}


def interrupted(folder: Path, name: str) -> Path:
    """A copy of the whole run as it was after its first checkpoint."""
    out = folder / name
    shutil.copytree(folder / "whole", out)
    shutil.rmtree(out / "checkpoints" / f"step_{STEPS}")
    shutil.rmtree(out / "adapter")
    return out


def rewrite(checkpoint: Path, name: str, content: bytes) -> None:
    """Put another file into a checkpoint, as its manifest says."""
    (checkpoint / name).write_bytes(content)
    manifest = json.loads((checkpoint / MARKER).read_text())
    manifest["files"][name] = {"bytes": len(content), "blake2b": _digest(checkpoint / name)}
    (checkpoint / MARKER).write_text(json.dumps(manifest))


def change_state(checkpoint: Path, change: Callable[[dict], None]) -> None:
    state = json.loads((checkpoint / "state.json").read_text())
    change(state)
    rewrite(checkpoint, "state.json", json.dumps(state).encode())


def contents(out: Path) -> dict[str, bytes]:
    return {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()}


def continue_finished(folder: Path) -> dict[str, dict]:
    """Nothing is left to do; or the run was killed between its last checkpoint and its adapter."""
    whole, before = folder / "whole", contents(folder / "whole")
    found = {"finished": start(folder, whole, resume_from_checkpoint="latest", learning_rate=1.0)}
    found["finished early"] = start(folder, whole, resume_from_checkpoint="latest", max_steps=STEPS - 1)
    found["unchanged"] = {"done": contents(whole) == before}
    shutil.copytree(whole, folder / "no_adapter")
    shutil.rmtree(folder / "no_adapter" / "adapter")
    found["no adapter"] = start(folder, folder / "no_adapter", resume_from_checkpoint="latest")
    return found


def continue_interrupted(folder: Path) -> dict[str, dict]:
    """With the same settings, with others, and from a checkpoint that says less about its run."""
    changes = {"learning_rate": 1e-3, "max_steps": STEPS + 2, "weight_decay": 0.1, "resume_from_checkpoint": "latest"}
    found = {"same": start(folder, interrupted(folder, "same"), resume_from_checkpoint="latest")}
    found["changed"] = start(folder, interrupted(folder, "changed"), **changes)
    zero1 = {"ds_config": ROOT / "ds_configs" / "zero1.json"}
    found["changed and moved"] = start(folder, interrupted(folder, "moved"), **changes, **zero1)
    older = interrupted(folder, "older")

    def forget(state: dict) -> None:
        for name in ("tp_plan", "deepspeed", "settings", "data_content", "base_weights"):
            del state["identity"][name]

    change_state(older / "checkpoints" / f"step_{MIDDLE}", forget)
    found["older"] = start(folder, older, resume_from_checkpoint="latest")
    return found


def continue_foreign(folder: Path) -> dict[str, dict]:
    """A checkpoint from elsewhere, whose every pickle is poisoned; and whose tensors are not what they should be."""
    theirs = interrupted(folder, "theirs") / "checkpoints" / f"step_{MIDDLE}"
    for file in [*theirs.rglob("*.pt")]:
        torch.save(Poison(folder / "opened"), file)
        rewrite(theirs, str(file.relative_to(theirs)), file.read_bytes())
    found = {"foreign": start(folder, folder / "mine", resume_from_checkpoint=theirs)}
    name = "training_state/tensors.safetensors"
    tensors = load((theirs / name).read_bytes())
    first = next(key for key in tensors if key.startswith("exp_avg:"))
    spoilt = {
        "another shape": tensors | {first: tensors[first].flatten()[:3].clone()},
        "another name": {f"{key}s" if key == first else key: tensor for key, tensor in tensors.items()},
        "no kind": {key: tensor for key, tensor in tensors.items() if not key.startswith("exp_avg_sq:")},
        "another step": {key: tensor + 1 if key.startswith("step:") else tensor for key, tensor in tensors.items()},
    }
    for what, stored in spoilt.items():
        rewrite(theirs, name, save(stored))
        found[what] = start(folder, folder / "refused", resume_from_checkpoint=theirs)
    rewrite(theirs, name, b"no tensors")
    found["no tensors"] = start(folder, folder / "refused", resume_from_checkpoint=theirs)
    return found


def continue_with_other_content(folder: Path) -> dict[str, dict]:
    """The paths are the same."""
    out, data, weights = interrupted(folder, "content"), folder / "data.jsonl", folder / "llama" / "model.safetensors"
    text = data.read_text()
    data.write_text(text + text.splitlines()[0] + "\n")
    found = {"other data": start(folder, out, resume_from_checkpoint="latest")}
    data.write_text(text)
    weights.write_bytes(
        save({name: tensor * 1.01 for name, tensor in load(weights.read_bytes()).items()}, {"format": "pt"})
    )
    found["other weights"] = start(folder, out, resume_from_checkpoint="latest")
    return found


def main() -> None:
    folder = Path(sys.argv[-1])
    groups.initialize(groups.read_world(), timeout_minutes=2)
    outcome = {"whole": start(folder, folder / "whole")}
    for way in (continue_finished, continue_interrupted, continue_foreign, continue_with_other_content):
        outcome |= way(folder)
    (folder / "outcome.json").write_text(json.dumps(outcome))
    groups.shut_down()


if __name__ == "__main__":
    main()
    groups.exit_process(0)
