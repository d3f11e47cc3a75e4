"""fidelity.json and a printed table: how far an approximate export is from the exact model."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comol_ds.export.logit_scores import EXACT, Score
from comol_ds.files import replace_file

FIDELITY_FILE = "fidelity.json"
BASE, WRITTEN = "base", "written"  # rows of the report beside "exact" and the names of the cores
WORST_MODULES = 10


@dataclass(frozen=True)
class Fidelity:
    """What is published beside an approximate export.

    Attributes:
        format: the export's --format.
        core: the core it was written with, "least-squares" or "mean-gate".
        calibration, held_out: what the tokens were, as the JSON says it.
        scores: "exact", "base", each core in fp32, and "written": the export as it lies on the disk.
        residuals: core -> module -> ||h M - h Mbar|| / ||h M|| on the held-out tokens.
    """

    format: str
    core: str
    calibration: Mapping[str, Any]
    held_out: Mapping[str, Any]
    scores: Mapping[str, Score]
    residuals: Mapping[str, Mapping[str, float]]

    def as_json(self) -> dict[str, Any]:
        return {
            "exact": False,
            "format": self.format,
            "core": self.core,
            "calibration": dict(self.calibration),
            "held_out": dict(self.held_out),
            "scores": {
                name: {
                    "kl_from_exact_nats": score.kl,
                    "top1_agreement": score.agreement,
                    "perplexity": score.perplexity,
                    "predicted_tokens": score.tokens,
                }
                for name, score in self.scores.items()
            },
            "residuals": {core: dict(modules) for core, modules in self.residuals.items()},
        }

    def write(self, folder: str | os.PathLike) -> None:
        """Write fidelity.json into a folder, whole or not at all."""
        text = json.dumps(self.as_json(), indent=2, allow_nan=False) + "\n"
        replace_file(Path(folder) / FIDELITY_FILE, [text])

    def table(self) -> str:
        """The scores, and the modules that the written core fits worst, as plain text."""
        tokens = self.scores[EXACT].tokens
        lines = [
            f"An approximation (--format {self.format}, {self.core} core): CoMoL's core differs from token to token,"
            " this one is constant.",
            f"On {tokens} held-out predicted tokens:",
            f"{'':<20}{'KL(exact || it)':>17}{'top-1 agreement':>17}{'perplexity':>13}",
        ]
        for name, score in self.scores.items():
            lines.append(f"{name:<20}{score.kl:>17.3g}{score.agreement:>17.1%}{score.perplexity:>13.4g}")
        return "\n".join([*lines, *self._module_lines()])

    def _module_lines(self) -> list[str]:
        written = self.residuals[self.core]
        worst = sorted(written, key=lambda module: -written[module])[:WORST_MODULES]
        width = max(map(len, worst)) + 2
        heading = f"Residual ||hM - h Mbar|| / ||hM||, the worst {len(worst)} of {len(written)} modules:"
        cores = "".join(f"{core:>15}" for core in self.residuals)
        rows = [
            f"{module:<{width}}" + "".join(f"{found[module]:>15.3f}" for found in self.residuals.values())
            for module in worst
        ]
        return [heading, f"{'':<{width}}{cores}", *rows]
