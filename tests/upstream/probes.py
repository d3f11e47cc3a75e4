"""What private names do where a signature says too little, tried on the smallest input."""

import argparse

import torch
from datasets import Dataset
from deepspeed.module_inject.autotp_config import PartitionType
from deepspeed.module_inject.tp_plan_converter import TPPlanConverter
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.other import get_pattern_key
from torch.utils._pytree import tree_leaves
from transformers.core_model_loading import WeightRenaming, rename_source_key

from comol_ds import CoMoLConfig
from comol_ds.adapters.comol_layer import CoMoLLinear


def converts_plans() -> bool:
    plan = {"layers.*.up_proj": "colwise", "layers.*.down_proj": "rowwise", "embed": "embedding_rowwise"}
    specs = TPPlanConverter.convert(plan)
    kinds = [spec.partition_type for spec in specs]
    found = [spec.matches("model.layers.1.up_proj.weight") for spec in specs]
    values = PartitionType.COLUMN.value, PartitionType.ROW.value
    return (
        kinds == [PartitionType.COLUMN, PartitionType.ROW, PartitionType.SKIP]
        and found == [True, False, False]
        and values == ("column", "row")
    )


def matches_endings() -> bool:
    config = CoMoLConfig(target_modules=["up_proj"])
    reached = [bool(check_target_module_exists(config, name)) for name in ("a.up_proj", "a.gate_up_proj")]
    return reached == [True, False] and get_pattern_key(["up_proj"], "a.up_proj") == "up_proj"


def finds_all_linears() -> bool:
    config = CoMoLConfig(target_modules="all-linear")
    model = torch.nn.ModuleDict(
        {"a": torch.nn.Linear(2, 2), "b": torch.nn.ReLU(), "c": CoMoLLinear(torch.nn.Linear(2, 2))}
    )
    _maybe_include_all_linear_layers(config, model)
    return config.target_modules == {"a", "c"}


def saved_configurations_name_a_version() -> bool:
    return CoMoLConfig().to_dict()["peft_version"] == CoMoLConfig().peft_version is not None


def renames() -> bool:
    rules = [WeightRenaming(r"^old\.", "new.")]
    return rename_source_key("old.w", rules, [], "model", {"new.w": torch.ones(1)}) == ("new.w", None)


def knows_the_base_layer() -> bool:
    layer = CoMoLLinear(torch.nn.Linear(2, 2))
    return layer.disable_adapters is False and layer._get_base_layer_device_and_dtype(layer.base_layer) == (
        torch.device("cpu"),
        torch.float32,
    )


def counts_versions() -> bool:
    tensor = torch.ones(3)
    before = tensor._version
    tensor.add_(1)
    return tensor._version == before + 1


def knows_bases() -> bool:
    tensor = torch.ones(3)
    return tensor._base is None and tensor[:1]._base is tensor


def tells_storages_apart() -> bool:
    one, other = torch.ones(3), torch.ones(3)
    addresses = [tensor.untyped_storage()._cdata for tensor in (one, one[1:], other)]
    return addresses[0] == addresses[1] != addresses[2]


def keeps_own_tensors() -> bool:
    norm = torch.nn.BatchNorm1d(2)
    return norm._parameters["weight"] is norm.weight and norm._buffers["running_mean"] is norm.running_mean


def lists_flags() -> bool:
    parser = argparse.ArgumentParser()
    parser.add_argument("--number")
    return "number" in [action.dest for action in parser._actions]


def fingerprints_rows() -> bool:
    one, other = Dataset.from_dict({"a": [1]}), Dataset.from_dict({"a": [2]})
    return isinstance(one._fingerprint, str) and one._fingerprint != other._fingerprint


def multiplies() -> bool:
    x, weight = torch.ones(2, 3), torch.ones(4, 3)
    return torch._C._nn.linear(x, weight).tolist() == [[3.0] * 4] * 2


def flattens() -> bool:
    return tree_leaves({"a": [1, (2,)]}) == [1, 2]
