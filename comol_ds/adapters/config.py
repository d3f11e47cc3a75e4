"""CoMoLConfig: what a user says about a CoMoL adapter, checked where it is said."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

from peft.config import PeftConfig
from peft.utils import PeftType

from comol_ds.adapters.initializers import CORE_INITIALIZERS
from comol_ds.adapters.routing import ROUTERS
from comol_ds.errors import UserError, shown

DROPOUT_SCHEMES = ("input", "paper")
# What no real adapter comes near: cores of 2^28 numbers take 1 GiB beside every Linear.
MAX_SIZE = 1 << 16  # of r and of num_experts
MAX_CORE_NUMBERS = 1 << 28
MAX_ALPHA = 1e9
ALL_LINEAR = "all-linear"


def register_peft_type(name: str) -> None:
    """Add `name` to PEFT's closed enum of adapter types, the one thing its registration does not do itself."""
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    type.__setattr__(PeftType, name, member)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)


register_peft_type("COMOL")


@dataclass
class CoMoLConfig(PeftConfig):
    """Configuration of a CoMoL adapter (arXiv 2603.00573), a PEFT configuration of type COMOL.

    With h = D(x) A^T and gates p, an adapted Linear returns x W^T + (lora_alpha / r) * (h sum_e p_e C_e) B^T.

    Args:
        r: rank R of the shared down- and up-projection.
        lora_alpha: the update is scaled by lora_alpha / r.
        lora_dropout: probability in [0, 1); where it applies is `dropout_scheme`.
        num_experts: number E of core experts [R, R].
        router: "core" routes on h (E R parameters), "input" on the undropped x (E I parameters).
        core_init: "paper" draws cores from U(-1/sqrt R, 1/sqrt R): with the near-uniform gates of the start, the
            adapter path begins about 1/sqrt(3 E) as strong as LoRA's (0.2 at E=8) and weaker as E grows.
            "orthogonal" starts at about 1/sqrt(E). "identity" adds small noise, summing to zero over the experts, to
            the identity: at uniform gates it is exactly LoRA.
        dropout_scheme: "input" drops x only, as LoRA does. "paper" also drops the merged core and the r-vector after
            it, which needs the merged core of every token, [N, R, R]: several times slower while training.
        target_modules: list of module name endings, a regular expression, or "all-linear". Every name must match a
            module. None takes what the model has of q_proj, k_proj, v_proj, o_proj and down_proj.
        exclude_modules: names or a regular expression that target_modules must not reach.
        modules_to_save: other modules that are trained and saved whole.
        layers_to_transform: layer index or indices to adapt, with a list of target_modules.
        layers_pattern: name of the model's layer list, only with layers_to_transform.
        init_adapter_weights: False draws B like a Linear's weight instead of zeros, so that the update is not zero.

    Raises:
        UserError: a value is outside its range, on one line with the accepted values.
    """

    r: int = field(default=16, metadata={"help": "Rank of the shared projections."})
    lora_alpha: float = field(default=16, metadata={"help": "The update is scaled by lora_alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout probability in [0, 1)."})
    num_experts: int = field(default=8, metadata={"help": "Number of core experts."})
    router: str = field(default="core", metadata={"help": "core: route on the r-vector h. input: route on x."})
    core_init: str = field(default="paper", metadata={"help": "paper, orthogonal or identity."})
    dropout_scheme: str = field(default="input", metadata={"help": "input: drop x. paper: also core and r-vector."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Module name endings, a regular expression, or 'all-linear'."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave out."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Other modules trained and saved."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layer indices to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the layer list."})
    init_adapter_weights: bool = field(default=True, metadata={"help": "False: B is random instead of zero."})

    def __new__(cls, *args: object, **settings: object) -> "CoMoLConfig":
        _refuse_unknown(settings, [field.name for field in fields(cls)])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        # PEFT notes its version in the configurations that it saves; what was saved is not judged by its names again.
        self.said_now = self.peft_version is None
        super().__post_init__()
        self.peft_type = PeftType.COMOL
        check_positive_int("r", self.r)
        check_positive_int("num_experts", self.num_experts)
        if self.num_experts * self.r**2 > MAX_CORE_NUMBERS:
            raise UserError(
                f"r={self.r} with num_experts={self.num_experts}: cores of {self.num_experts * self.r**2:,} numbers"
                f" for every Linear; num_experts * r * r must be at most {MAX_CORE_NUMBERS:,}"
            )
        if not _is_number(self.lora_alpha) or not 0 < self.lora_alpha <= MAX_ALPHA:
            raise UserError(
                f"lora_alpha is {shown(self.lora_alpha)}; it must be a number above 0 and at most {MAX_ALPHA:.0e}"
            )
        if not _is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora_dropout is {shown(self.lora_dropout)}; it must lie in [0, 1)")
        check_choice("router", self.router, ROUTERS)
        check_choice("core_init", self.core_init, tuple(CORE_INITIALIZERS))
        check_choice("dropout_scheme", self.dropout_scheme, DROPOUT_SCHEMES)
        for name in ("init_adapter_weights", "inference_mode"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name} is {shown(getattr(self, name))}; it must be true or false")
        if not isinstance(self.base_model_name_or_path, str | None):
            raise UserError(
                f"base_model_name_or_path is {shown(self.base_model_name_or_path)}; it must be a folder or hub name"
            )
        self._check_modules()
        # PEFT's models for classes and answers add the names of their heads later, of which a model has one.
        self.said_modules_to_save = list(self.modules_to_save or ())

    def _check_modules(self) -> None:
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
            value = getattr(self, name)
            accepts_pattern = name != "modules_to_save"
            if value is None or (accepts_pattern and isinstance(value, str)) or _is_names(value):
                continue
            either = "a regular expression or " if accepts_pattern else ""
            raise UserError(f"{name} is {shown(value)}; it must be {either}a list of names")
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                _check_pattern(name, value)
            elif value is not None:
                setattr(self, name, set(value))
        for name in ("modules_to_save", "layers_pattern"):  # PEFT puts their names into a regular expression
            value = getattr(self, name) or ()
            for pattern in [value] if isinstance(value, str) else value:
                _check_pattern(name, pattern)
        layers = self.layers_to_transform
        if layers is not None and not all(map(_is_index, layers if isinstance(layers, list | tuple) else [layers])):
            raise UserError(f"layers_to_transform is {shown(layers)}; it must be a layer's number from 0 on, or a list")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise UserError("layers_to_transform works with a list of target_modules, not with a regular expression")
        if self.layers_pattern and self.layers_to_transform is None:
            raise UserError(f"layers_pattern {shown(self.layers_pattern)} has no effect without layers_to_transform")


def _refuse_unknown(settings: Mapping[str, object], known: Sequence[str]) -> None:
    """Refuse settings of other methods by name.

    In a saved configuration, which has PEFT's version in it, one that is switched off is left to PEFT: it leaves out
    what a newer version added, and says so.
    """
    is_saved = "peft_version" in settings
    for name, value in settings.items():
        if name not in known and not (is_saved and value in (None, False, "none", "", [], {})):
            raise UserError(f"CoMoL has no {name} (it is {shown(value)}); its settings are {', '.join(known)}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_names(value: object) -> bool:
    return isinstance(value, list | tuple | set | frozenset) and all(isinstance(name, str) for name in value)


def _check_pattern(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"{name} {shown(pattern)} is not a regular expression: {error}") from error


def check_positive_int(name: str, value: int) -> None:
    """Raise UserError unless value is a whole number from 1 to MAX_SIZE."""
    if not _is_index(value) or not 1 <= value <= MAX_SIZE:
        raise UserError(f"{name} is {shown(value)}; it must be a whole number of at least 1 and at most {MAX_SIZE}")


def check_choice(name: str, value: str, accepted: tuple[str, ...]) -> None:
    """Raise UserError unless value is one of the accepted ones."""
    if value not in accepted:
        raise UserError(f"{name} is {shown(value)}; it must be one of {', '.join(accepted)}")
