"""Suites of cases that worker scripts train."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.distributed.launching import run_deepspeed


def suite_trainer(
    worker: str, ranks: Mapping[str, int], models: Path, factory: pytest.TempPathFactory, extensions: Path
) -> Callable[[str], Path]:
    """Suite -> folder with every case trained; a suite's processes start once, when it is first asked for.

    Args:
        worker: script of this folder that takes SUITE MODELS OUTPUT_FOLDER.
        ranks: number of ranks of every suite.
        models: folder with one model folder per family.
        factory: makes the output folders.
        extensions: with DeepSpeed's compiled op.
    """
    folders: dict[str, Path] = {}

    def train(suite: str) -> Path:
        if suite not in folders:
            folders[suite] = factory.mktemp(suite)
            words = [suite, str(models), str(folders[suite])]
            run = run_deepspeed(ranks[suite], Path(__file__).parent / worker, words, extensions, timeout=280)
            assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
        return folders[suite]

    return train
