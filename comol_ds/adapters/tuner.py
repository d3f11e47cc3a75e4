"""CoMoL as a PEFT tuner: finds the target Linears of a model and wraps them."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from comol_ds.adapters.comol_layer import NO_MERGE, CoMoLLinear
from comol_ds.adapters.config import CoMoLConfig
from comol_ds.adapters.expressions import check_matching_ends
from comol_ds.adapters.mixed_batch import mixed_batch, rows_of
from comol_ds.adapters.targets import adds_to, linear_suffixes, narrowed_by, settle_targets
from comol_ds.errors import UserError


class CoMoLModel(BaseTuner):
    """The tuner that `peft.get_peft_model` builds for a CoMoLConfig. Adapters are initialized in module order.

    Attributes:
        left_beside_text: modules that match the targets of the newest adapter and were not adapted, because no token
            passes through them.
    """

    prefix: str = "comol_"
    tuner_layer_cls = CoMoLLinear
    target_module_mapping: ClassVar[dict[str, Any]] = {}  # PEFT's, by model type; ours asks the model

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Wrap the target Linears of `model`.

        Names that end like several modules, the defaults and "all-linear" mean those of the text model; what lies
        beside it, such as a vision tower, is adapted where a whole name or a regular expression says so. The
        configuration then excludes it. One that was saved before is taken as it is.

        Raises:
            UserError: nothing matches, or a name of a configuration that was not saved matches nothing (what exists is
                listed), a match is no Linear, or matching an expression takes too long.
        """
        check_matching_ends(self.peft_config[adapter_name], (name for name, _ in model.named_modules()))
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except NoMatchingPeftModuleError as error:
            config = self.peft_config[adapter_name]
            raise UserError(
                f"target_modules {_shown(config.target_modules)} match no module of the model"
                f"{narrowed_by(config)}; its Linear modules end in: {', '.join(linear_suffixes(model)) or 'none'}"
            ) from error

    def _prepare_adapter_config(self, peft_config: CoMoLConfig, model_config: dict) -> CoMoLConfig:
        self.left_beside_text = settle_targets(peft_config, self.model)  # before the first module is wrapped
        return peft_config

    def _create_and_replace(
        self,
        peft_config: CoMoLConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        if not isinstance(target, nn.Linear | CoMoLLinear):
            raise UserError(
                f"target_modules match {current_key!r}, a {type(target).__name__}; CoMoL wraps nn.Linear only"
            )
        if not adds_to(target):
            raise UserError(
                f"target_modules match {current_key!r}, a {type(target).__name__}, which does not return x W^T;"
                " CoMoL wraps what returns one tensor [..., out_features]"
            )
        layer = target if isinstance(target, CoMoLLinear) else CoMoLLinear(target)
        if layer is not target:
            layer.set_adapter(self.active_adapters)
            self._replace_module(parent, target_name, layer, target)
        layer.add_adapter(
            adapter_name,
            r=peft_config.r,
            lora_alpha=peft_config.lora_alpha,
            num_experts=peft_config.num_experts,
            router=peft_config.router,
            core_init=peft_config.core_init,
            lora_dropout=peft_config.lora_dropout,
            dropout_scheme=peft_config.dropout_scheme,
            init_adapter_weights=peft_config.init_adapter_weights,
        )

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Adapters are born in fp32; autocast_adapter_dtype=False asks for the base's floating dtype instead."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        for layer in self.model.modules():
            if isinstance(layer, CoMoLLinear):
                _, dtype = layer._get_base_layer_device_and_dtype(layer.get_base_layer())
                _cast_adapter(layer, adapter_name, dtype)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT enters this around forward and generate; `adapter_names` there makes a mixed batch."""
        names = kwargs.get("adapter_names")
        with nullcontext() if names is None else mixed_batch(self, names, rows_of(self.model, args, kwargs)):
            yield

    def _check_merge_allowed(self) -> None:
        raise UserError(NO_MERGE)

    @classmethod
    def _get_adapter_state_dict(cls, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """What is saved. Under ZeRO-3 a parameter that is not gathered has shape (0,); PEFT would write it like that.

        Raises:
            UserError: a tensor is empty.
        """
        tensors = super()._get_adapter_state_dict(*args, **kwargs)
        empty = next((name for name, tensor in tensors.items() if tensor.numel() == 0), None)
        if empty is not None:
            raise UserError(
                f"{empty} is empty, ZeRO-3 holds it in partitions; save with launch/train.py, or pass a gathered"
                ' state_dict ("stage3_gather_16bit_weights_on_model_save": true does so in HF Trainer)'
            )
        return tensors


def _cast_adapter(layer: CoMoLLinear, adapter_name: str, dtype: torch.dtype | None) -> None:
    if dtype is None or not dtype.is_floating_point:
        return
    for name in layer.adapter_layer_names:
        parameters = getattr(layer, name)
        if adapter_name in parameters:
            old = parameters[adapter_name]
            parameters[adapter_name] = nn.Parameter(old.detach().to(dtype), requires_grad=old.requires_grad)


def _shown(target_modules: Any) -> str:
    return repr(target_modules) if isinstance(target_modules, str | None) else ", ".join(sorted(target_modules))


register_peft_method(name="comol", config_cls=CoMoLConfig, model_cls=CoMoLModel, prefix="comol_")
