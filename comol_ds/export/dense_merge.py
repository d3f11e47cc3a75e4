"""A static update merged into a base's weights, file by file: memory does not grow with the model.

The files keep their headers, so also the order, metadata and dtypes of their tensors, and every byte of what is not
updated. The result is as approximate as the static update: CoMoL's own depends on the token (arXiv 2603.00573).
"""

import os
import statistics
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils import CHAT_TEMPLATE_DIR

from comol_ds.errors import UserError
from comol_ds.export.merge_plan import MergePlan, plan_merge
from comol_ds.export.merged_file import Replacement, RoundingLoss, Update, write_merged_file
from comol_ds.export.staged_folder import staged_folder
from comol_ds.export.static_lora import StaticLora
from comol_ds.files import copy_new, sync

# ||delta|| / ||W|| below which a bfloat16 base is warned of (0.17 of delta is lost there) and refused (0.5). Float16
# has an eighth of its spacing, so an eighth of these; float32 loses next to nothing of any update.
WARN_RATIO = 1e-2
REFUSE_RATIO = 3e-3
_SPACING = {"bfloat16": 1, "float16": 1 / 8}
_OTHER_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json",
)  # fmt: skip


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        modules: module -> what the cast took from its update.
        replaced: stored tensors that got other values as a whole.
        left_out: what was not copied of the base's folder: other forms of its weights, subfolders.
        warnings: one line each.
    """

    modules: dict[str, RoundingLoss]
    replaced: list[str]
    left_out: list[str]
    warnings: list[str]

    def lines(self) -> list[str]:
        """The report as text."""
        found = [f"update merged into {len(self.modules)} modules"]
        if self.replaced:
            found.append(f"replaced: {', '.join(self.replaced)}")
        by_dtype: dict[str, list[float]] = defaultdict(list)
        for loss in self.modules.values():
            by_dtype[loss.dtype].append(loss.lost)
        for dtype, lost in by_dtype.items():
            found.append(
                f"rounding to {dtype} lost {statistics.median(lost):.1%} (median) to {max(lost):.1%} of an update"
            )
        if self.left_out:
            found.append(f"not copied: {', '.join(self.left_out)}")
        return found + [f"warning: {warning}" for warning in self.warnings]


def merge_into_base(
    base_folder: str | os.PathLike,
    static: StaticLora,
    output_dir: str | os.PathLike,
    *,
    overwrite: bool = False,
    allow_rounding_loss: bool = False,
    replacements: Mapping[str, torch.Tensor] | None = None,
) -> MergeReport:
    """Write the base with the update in its weights; the folder appears whole or not at all.

    Beyond `static` and the replacements it takes less than 300 MiB of memory, whatever the model.

    Args:
        base_folder: a model in transformers' format, its weights in safetensors files.
        static: the update.
        output_dir: the new model's folder.
        overwrite: replace a model that is there.
        allow_rounding_loss: write even where the base's dtype keeps too little of an update.
        replacements: parameter's name in the model -> values that take its place, cast once to the stored dtype.

    Raises:
        UserError: the base is unreadable, quantized or not the adapter's; the folder cannot be written; a new weight is
            not finite; or the cast would lose too much of an update.
    """
    base = Path(base_folder).resolve()
    plan = plan_merge(base, static, replacements or {})
    others, left_out = _other_files(base, plan)
    size = sum(file.stat().st_size for file in plan.files.by_file)
    needed = size + sum(file.stat().st_size for file in others)
    losses: dict[str, RoundingLoss] = {}
    with staged_folder(Path(output_dir), overwrite, needed, sources=[base]) as staging:
        for file in others:
            copy = staging / file.relative_to(base)
            copy.parent.mkdir(exist_ok=True)
            copy_new(file, copy)
            sync(copy)
        with tqdm(desc="merging", total=size, unit="B", unit_scale=True, unit_divisor=1024, disable=None) as bar:
            for file in plan.files.by_file:
                target = staging / file.relative_to(base)
                target.parent.mkdir(parents=True, exist_ok=True)
                merged = write_merged_file(file, target, _changes(plan, file, static), bar.update)
                if not allow_rounding_loss:
                    _refuse_loss(merged)
                losses |= merged
    assert losses.keys() == static.down.keys(), "every update is merged once"
    return MergeReport(losses, sorted(plan.replacements), left_out, _warnings(losses))


def _changes(plan: MergePlan, file: Path, static: StaticLora) -> list[Update | Replacement]:
    changes: list[Update | Replacement] = []
    for tensor in plan.files.by_file[file]:
        if tensor.name in plan.updates:
            module = plan.updates[tensor.name]
            changes.append(Update(tensor, module, static.down[module], static.up[module]))
        elif tensor.name in plan.replacements:
            changes.append(Replacement(tensor, plan.replacements[tensor.name]))
    return changes


def _other_files(base: Path, plan: MergePlan) -> tuple[list[Path], list[str]]:
    """The files that are copied beside the weights, and the names of what is not; hidden ones are in neither."""
    copied, left_out = [], []
    for path in sorted(base.iterdir()):
        if path.name.startswith(".") or path in plan.files.by_file:
            continue
        if any(path in file.parents for file in plan.files.by_file):
            continue  # a folder of shards
        if path.is_dir() and path.name == CHAT_TEMPLATE_DIR:
            copied += [file for file in sorted(path.iterdir()) if file.is_file()]
        elif path.is_file() and (path == plan.files.path or not path.name.endswith(_OTHER_WEIGHTS)):
            copied.append(path)
        else:
            left_out.append(path.name)
    return copied, left_out


def _is_below(loss: RoundingLoss, ratio: float) -> bool:
    """Whether an update that is not zero is smaller than ``ratio``, meant for bfloat16, makes of its dtype."""
    return 0 < loss.ratio < ratio * _SPACING.get(loss.dtype, 0)


def _refuse_loss(losses: dict[str, RoundingLoss]) -> None:
    refused = [module for module, loss in losses.items() if _is_below(loss, REFUSE_RATIO)]
    if refused:
        worst = min(refused, key=lambda module: losses[module].ratio)
        loss = losses[worst]
        raise UserError(
            f"{worst}: the update is {loss.ratio:.1e} of the weight, of which {loss.dtype} loses {loss.lost:.0%};"
            " export with --format lora, merge into a float32 copy of the base, or accept it with --allow_rounding_loss"
        )


def _warnings(losses: dict[str, RoundingLoss]) -> list[str]:
    small: dict[str, list[str]] = defaultdict(list)  # dtype -> modules
    for module, loss in losses.items():
        if _is_below(loss, WARN_RATIO):
            small[loss.dtype].append(module)
    lines = []
    for dtype, modules in small.items():
        worst = max(modules, key=lambda module: losses[module].lost)
        lines.append(
            f"the updates of {len(modules)} of {len(losses)} modules are below {WARN_RATIO * _SPACING[dtype]:.2g} of"
            f" their weights: {dtype} loses up to {losses[worst].lost:.0%} of them, most in {worst}"
        )
    return lines
