"""Which Linear is split by columns and which by rows, and what tensor parallelism cannot do to a model.

A plan is transformers' tp_plan: name pattern -> style, the model's own one or a JSON file of the user. Everything here
reads modules, names and sizes only, so it works on a model without memory, before a rank waits for another.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from deepspeed.module_inject.autotp_config import PartitionType
from deepspeed.module_inject.tp_plan_converter import TPPlanConverter
from torch import nn
from transformers import PreTrainedModel

from comol_ds.adapters.expressions import first_endless
from comol_ds.adapters.table import BaseKind
from comol_ds.config import AdapterSettings
from comol_ds.errors import UserError
from comol_ds.layout import divisors, either
from comol_ds.text_files import read_json_settings

# Styles whose modules stay whole: an embedding (split over the vocabulary by us, whatever the plan says), and a norm
# between sharded projections, which works on one head at a time and is frozen.
_WHOLE = ("embedding_rowwise", "replicated_with_grad_allreduce")
_GATHERED = ("colwise_gather_output", "colwise_rep")  # its former name
_ACCEPTED = ("colwise", "rowwise", *_WHOLE)

# Dropout inside a sharded region: the ranks hold different heads or columns and would draw the same mask for them.
_SHARDED_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "activation_dropout")

# Plans are names with a star or two; matching them takes no time, and neither would four stars.
_NAMES_AND_STARS = re.compile(r"[\w.]*(\*[\w.]*){0,4}")
_EXAMPLE = '{"layers.*.up_proj": "colwise", "layers.*.down_proj": "rowwise"}'


@dataclass(frozen=True)
class _Plan:
    """Pattern -> style, how messages call it, and the remedy where the user cannot correct it."""

    styles: dict[str, str]
    source: str
    is_file: bool

    def error(self, fault: str, remedy: str) -> UserError:
        """``remedy`` is for the author of a file; a model's own plan can only be replaced."""
        return UserError(f"{self.source}{fault}; {remedy if self.is_file else _REPLACE}")


_REPLACE = "give another plan with --tp_plan FILE or use --tensor_parallel_size 1"


def place_linears(model: PreTrainedModel, plan_file: str | None) -> dict[str, BaseKind]:
    """Apply a plan to a model's module names.

    The output head and the input embedding are always split over the vocabulary and not part of the answer.

    Args:
        model: without adapters; only names, types and widths are read.
        plan_file: JSON object of pattern -> style, in place of the model's own plan. None: the model's own.

    Returns:
        Full name of every nn.Linear to shard -> "column" or "row".

    Raises:
        UserError: no plan, an unreadable one, or one that would compute something else than the whole model.
    """
    plan = _plan_of(model, plan_file)
    _check_styles(plan)
    placement = _match(model, plan)
    if not placement:
        raise plan.error(" shards no Linear layer", f"write one like {_EXAMPLE}")
    _check_pairs(model, placement, plan)
    if plan.is_file:
        _check_widths(model, placement, plan)
    return placement


def check_placement(
    model: PreTrainedModel, placement: dict[str, BaseKind], tensor_parallel: int, adapter: AdapterSettings
) -> None:
    """Refuse a model or adapter that cannot be split over ``tensor_parallel`` > 1 ranks.

    Args:
        model: as given to `place_linears`.
        placement: its answer.
        tensor_parallel: ranks that share one copy of the model.
        adapter: the adapter that will be attached.

    Raises:
        UserError: naming the value, and sizes that work where another size would.
    """
    asked = f"--tensor_parallel_size {tensor_parallel}"
    if adapter.modules_to_save:
        raise UserError(
            f"--modules_to_save {' '.join(adapter.modules_to_save)} with {asked}: modules trained whole are not"
            " supported; drop it or use --tensor_parallel_size 1"
        )
    if getattr(model.config, "quantization_config", None) is not None:
        raise UserError(f"{asked}: quantized weights cannot be sharded; use a model without quantization_config")
    settings = model.config.get_text_config()
    for name in _SHARDED_DROPOUTS:
        if getattr(settings, name, 0.0):
            raise UserError(
                f"{asked}: {name} is {getattr(settings, name)} and the ranks would draw the same mask for different"
                " parts; set it to 0 in the model's config.json"
            )
    _check_ends(model, asked)
    sizes = divided_sizes(model, placement)
    vocabulary = model.get_input_embeddings().num_embeddings
    working = [k for k in divisors(math.gcd(*sizes.values())) if 1 < k <= vocabulary]
    remedy = f"use {either(working or [1])}"
    for what, size in sizes.items():
        if size % tensor_parallel:
            raise UserError(f"{asked} does not divide {what} = {size}; {remedy}")
    if vocabulary < tensor_parallel:
        raise UserError(f"{asked}: the vocabulary has {vocabulary} rows, fewer than ranks; {remedy}")


def plan_error(model: PreTrainedModel, plan_file: str | None, fault: str) -> UserError:
    """What to raise about a plan that `place_linears` has accepted; ``fault`` continues the plan's name."""
    return _plan_of(model, plan_file).error(fault, "leave these layers out of the plan or use --tensor_parallel_size 1")


def _plan_of(model: PreTrainedModel, plan_file: str | None) -> _Plan:
    return _own_plan(model) if plan_file is None else _read_plan(plan_file)


def _read_plan(plan_file: str) -> _Plan:
    source = f"--tp_plan {plan_file}"
    styles = read_json_settings(plan_file, "--tp_plan", "check the path")
    if not isinstance(styles, dict) or not styles or not all(isinstance(style, str) for style in styles.values()):
        raise UserError(f"{source} must hold a JSON object of pattern and style, like {_EXAMPLE}")
    return _Plan(styles, source, is_file=True)


def _own_plan(model: PreTrainedModel) -> _Plan:
    kind = model.config.model_type
    if not model.tp_plan:
        raise UserError(
            f"model type {kind!r} has no tensor-parallel plan; write one like {_EXAMPLE} and give it with"
            " --tp_plan FILE, or use --tensor_parallel_size 1"
        )
    return _Plan(model.tp_plan, f"the tensor-parallel plan of model type {kind!r}", is_file=False)


def _check_styles(plan: _Plan) -> None:
    for pattern, style in plan.styles.items():
        if style.lower() not in (*_ACCEPTED, *_GATHERED):
            raise plan.error(
                f": style {style!r} of {pattern!r} is not supported", f"the accepted ones are {', '.join(_ACCEPTED)}"
            )


def _match(model: PreTrainedModel, plan: _Plan) -> dict[str, BaseKind]:
    head = model.get_output_embeddings()
    with_weight = {name: module for name, module in model.named_modules() if hasattr(module, "weight")}
    chosen: dict[str, tuple[str, BaseKind]] = {}  # name -> the pattern that matched first, and its kind
    for (pattern, style), spec in zip(plan.styles.items(), TPPlanConverter.convert(plan.styles), strict=True):
        if plan.is_file and not _NAMES_AND_STARS.fullmatch(pattern):
            _check_matching_ends(plan, pattern, spec.patterns, with_weight)
        try:
            # DeepSpeed's patterns are about parameters
            matches = [name for name in with_weight if spec.matches(f"{name}.weight")]
        except re.error as error:
            raise plan.error(f": {pattern!r} is no pattern of names", f"write names, dots and *: {error}") from error
        if not matches:
            raise plan.error(f": {pattern!r} matches no module with a weight", "correct it or remove it")
        if spec.partition_type == PartitionType.SKIP:
            continue
        kind = spec.partition_type.value
        for name in matches:
            if with_weight[name] is head:
                continue
            _check_linear(with_weight[name], name, pattern, style, plan)
            other, known = chosen.setdefault(name, (pattern, kind))
            if known != kind:
                raise plan.error(f": {other!r} and {pattern!r} place {name} differently", "remove one")
    return {name: kind for name, (_, kind) in chosen.items()}


def _check_matching_ends(plan: _Plan, pattern: str, expressions: list[str], names: Iterable[str]) -> None:
    parameters = [f"{name}.weight" for name in names]
    if first_endless([("match", expression) for expression in expressions], parameters) is not None:
        raise plan.error(f": matching {pattern!r} does not end in seconds", "write names, dots and *")


def _check_linear(module: nn.Module, name: str, pattern: str, style: str, plan: _Plan) -> None:
    if not isinstance(module, nn.Linear):
        raise plan.error(
            f": {pattern!r} matches {name}, a {type(module).__name__}", f"only nn.Linear can be {style}, remove it"
        )
    if style.lower() in _GATHERED:
        raise plan.error(
            f": {pattern!r} gathers the output of {name} ({style}), which is supported for the output head only",
            "use colwise, and rowwise for the layer after it",
        )


def _check_pairs(model: PreTrainedModel, placement: dict[str, BaseKind], plan: _Plan) -> None:
    """Columns leave slices that only rows take back, and nothing between them may need the whole.

    A Linear left whole beside sharded ones would feed, or be fed by, one rank's slices: its output, or the gradient
    that it passes on, would differ between ranks without any error.
    """
    for parent, kinds in _by_parent(placement).items():
        if len(kinds) == 1:
            ((kind, (name, *_)),) = kinds.items()
            other = {"column": "row", "row": "column"}[kind]
            raise plan.error(
                f" shards {name} by {kind} and nothing in {parent!r} by {other}", f"place the {other} half too"
            )
        module = model.get_submodule(parent)
        own = [name for name, _ in module.named_parameters(recurse=False)]
        linear = [name for name, child in module.named_children() if isinstance(child, nn.Linear)]
        for name in (f"{parent}.{name}" for name in (*own, *linear)):
            if name not in placement:
                raise plan.error(
                    f" leaves {name} whole beside sharded layers and would mix slices with the whole",
                    "place it too or use --tensor_parallel_size 1",
                )


def _check_widths(model: PreTrainedModel, placement: dict[str, BaseKind], plan: _Plan) -> None:
    """Refuse fused projections: [q; k; v] or [gate; up] in one weight, whose contiguous slices mix them silently.

    They are wider than the row-parallel layer that they feed. So are query, key and value interleaved by head, which
    slices keep together; the models that have it (GPT-NeoX) bring a plan of their own.
    """
    for kinds in _by_parent(placement).values():
        limit, row = max((model.get_submodule(name).in_features, name) for name in kinds["row"])
        for name in kinds["column"]:
            width = model.get_submodule(name).out_features
            if width > limit:
                raise plan.error(
                    f": {name} has {width} outputs for the {limit} inputs of {row}, so it holds several projections"
                    " that slices would mix",
                    "use --tensor_parallel_size 1",
                )


def _by_parent(placement: dict[str, BaseKind]) -> dict[str, dict[BaseKind, list[str]]]:
    """{"mlp.up": "column", "mlp.down": "row"} -> {"mlp": {"column": ["mlp.up"], "row": ["mlp.down"]}}."""
    parents = defaultdict(lambda: defaultdict(list))
    for name, kind in placement.items():
        parents[name.rpartition(".")[0]][kind].append(name)
    return parents


def _check_ends(model: PreTrainedModel, asked: str) -> None:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or embedding.max_norm is not None:
        raise UserError(
            f"{asked}: the input embedding is a {type(embedding).__name__}, only an nn.Embedding without max_norm can"
            " be split over the vocabulary; use --tensor_parallel_size 1"
        )
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"{asked}: the output head is a {type(head).__name__}, only an nn.Linear can be split over the vocabulary;"
            " use --tensor_parallel_size 1"
        )


def divided_sizes(model: PreTrainedModel, placement: dict[str, BaseKind]) -> dict[str, int]:
    """What must be a multiple of the tensor-parallel size, by name, in the order of complaint; as `check_placement`."""
    settings = model.config.get_text_config()
    heads = settings.num_attention_heads
    sizes = {
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(settings, "num_key_value_heads", None) or heads,
    }
    for name, kind in placement.items():
        linear = model.get_submodule(name)
        side = "out_features" if kind == "column" else "in_features"
        sizes[f"{side} of {name}"] = getattr(linear, side)
    return sizes
