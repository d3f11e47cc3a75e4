"""launch/train.py called in this process on tiny inputs, and what it must leave untouched."""

import importlib.util
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from comol_ds.training import loop, set_up

REPOSITORY = Path(__file__).resolve().parents[2]


@cache
def launcher() -> ModuleType:
    spec = importlib.util.spec_from_file_location("launch_train", REPOSITORY / "launch" / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Inputs:
    """A tiny model, its data and an empty folder for the test; `out` does not exist yet."""

    model: Path
    data: str
    folder: Path

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def argv(self, *extra: Any, **changes: Any) -> list[str]:
        """A run that works, with some flags changed; None leaves a flag out. `extra` follows as it is."""
        flags = {
            "ds_config": REPOSITORY / "ds_configs" / "zero1.json",
            "model_name_or_path": self.model,
            "dataset": self.data,
            "output_dir": self.out,
            "max_length": 64,
            "max_steps": 2,
            "report_to": "none",
            "bf16": "false",
        } | changes
        given = [(name, value) for name, value in flags.items() if value is not None]
        words = [word for name, value in given for word in (f"--{name}", *_words(value))]
        return [str(word) for word in (*words, *extra)]

    def write(self, name: str, content: Any) -> Path:
        """A file of the test; what is no text becomes JSON."""
        path = self.folder / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    def ds_json(self, **changes: Any) -> Path:
        """ds_configs/zero1.json with some blocks changed."""
        template = json.loads((REPOSITORY / "ds_configs" / "zero1.json").read_text(encoding="utf-8"))
        return self.write("ds.json", template | changes)


def _words(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder with its content."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def refused(inputs: Inputs, capfd, monkeypatch, argv: list[str]) -> str:
    """The message of a run that must end with code 2 before the model is loaded, and change no file.

    The process group is left out: joining one compiles DeepSpeed's CPU op, whose compiler writes to stderr too.
    tests/distributed/test_bad_input_ranks.py has it.
    """

    def too_late(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model is being built, the input should have been refused")

    monkeypatch.setattr(set_up, "assemble", too_late)
    monkeypatch.setattr(loop.groups, "initialize", lambda *args: None)
    before = snapshot(inputs.folder)
    capfd.readouterr()
    code = launcher().main(argv)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("train.py: error: ")
    assert code == 2
    assert snapshot(inputs.folder) == before
    return lines[0].removeprefix("train.py: error: ")
