"""--format lora and merged: one constant core per module, written, and measured beside the exact model."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel

from comol_ds.adapters.adapter_folder import KEY_PREFIX, split_tensors
from comol_ds.export.core_sums import calibrate
from comol_ds.export.dense_merge import MergeReport, merge_into_base
from comol_ds.export.fidelity import BASE, WRITTEN, Fidelity
from comol_ds.export.logit_scores import (
    Logits,
    Score,
    base_logits,
    constant_core_logits,
    logits_of,
    lora_beside,
    recorded,
    replayed,
    score,
)
from comol_ds.export.lora_folder import write_lora
from comol_ds.export.source import AdapterSource, base_folder
from comol_ds.export.static_core import CORES, Cores, residuals, static_lora
from comol_ds.export.static_lora import StaticLora
from comol_ds.export.validate import validate_folder
from comol_ds.serving.calibration_data import TokenSet, calibration_and_test
from comol_ds.serving.inference import load_adapted, load_base, load_tokenizer


@dataclass(frozen=True)
class Approximation:
    """The flags of an approximate export, see launch/export.py --help."""

    core: str
    calibration: Sequence[str] | None
    max_records: int
    batch_size: int
    dtype: str
    allow_rounding_loss: bool


@dataclass(frozen=True)
class _Calibrated:
    """Every kind of constant core, and what they are judged by.

    Attributes:
        cores: kind -> module -> core.
        residuals: kind -> module -> relative error of h M on the held-out tokens.
        description: of the calibration tokens, for fidelity.json.
        held_out: the tokens that no core was computed from.
    """

    cores: Mapping[str, Cores]
    residuals: Mapping[str, Mapping[str, float]]
    description: Mapping[str, Any]
    held_out: TokenSet


def write_static_lora(source: AdapterSource, folder: Path, options: Approximation) -> list[str]:
    """Write a LoRA folder for any server, and fidelity.json; the lines to print.

    Raises:
        UserError: no such base or data, or an adapter that no static LoRA can hold.
    """
    model, found = _calibrate(source, options)
    static = static_lora(source.tensors, source.config, found.cores[options.core])
    write_lora(static, source.base, folder)
    validate_folder(folder, base=source.base)
    written = {WRITTEN: logits_of(lora_beside(model, folder))}
    scores = score(logits_of(model), _models(model, found.cores) | written, found.held_out.batches())
    return _report(found, scores, folder, "lora", options.core)


def write_static_merge(source: AdapterSource, folder: Path, options: Approximation) -> list[str]:
    """Write the base with the static update in its weights, and fidelity.json; the lines to print.

    Raises:
        UserError: no such base or data, or one whose weights cannot take the update.
    """
    model, found = _calibrate(source, options)
    merged = _merge(source, found.cores[options.core], folder, options)
    if source.tokenizer not in (source.base, str(source.folder)):
        load_tokenizer(source).save_pretrained(folder)
    with tempfile.TemporaryDirectory(dir=folder.parent) as records:
        exact = recorded(logits_of(model), records)
        scores = score(exact, _models(model, found.cores), found.held_out.batches())
        del model, exact  # two models need not fit in memory
        written = logits_of(load_base(str(folder), options.dtype))
        scores |= score(replayed(records), {WRITTEN: written}, found.held_out.batches())
    return [*merged.lines(), *_report(found, scores, folder, "merged", options.core)]


def _calibrate(source: AdapterSource, options: Approximation) -> tuple[PeftModel, _Calibrated]:
    """The exact model, and the cores computed with it."""
    calibration, held_out = calibration_and_test(
        source, load_tokenizer(source), options.calibration, options.max_records, options.batch_size
    )
    model = load_adapted(source, options.dtype)
    sums = calibrate(model, calibration.batches())
    cores = {kind: compute(sums) for kind, compute in CORES.items()}
    judged = calibrate(model, held_out.batches())
    errors = {kind: residuals(judged, found) for kind, found in cores.items()}
    description = calibration.as_json() | {"dtype": str(model.dtype).removeprefix("torch.")}
    return model, _Calibrated(cores, errors, description, held_out)


def _merge(source: AdapterSource, cores: Cores, folder: Path, options: Approximation) -> MergeReport:
    _, whole = split_tensors(source.tensors, source.config)
    adapter = {key: value for key, value in source.tensors.items() if key.removeprefix(KEY_PREFIX) not in whole}
    static: StaticLora = static_lora(adapter, source.config, cores)
    return merge_into_base(
        base_folder(source.base), static, folder, allow_rounding_loss=options.allow_rounding_loss, replacements=whole
    )


def _models(model: PeftModel, cores: Mapping[str, Cores]) -> dict[str, Logits]:
    """What is compared with the exact model, beside what was written."""
    return {BASE: base_logits(model)} | {kind: constant_core_logits(model, found) for kind, found in cores.items()}


def _report(found: _Calibrated, scores: Mapping[str, Score], folder: Path, export_format: str, core: str) -> list[str]:
    fidelity = Fidelity(export_format, core, found.description, found.held_out.as_json(), scores, found.residuals)
    fidelity.write(folder)
    return [fidelity.table()]
