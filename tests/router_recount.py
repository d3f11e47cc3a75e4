"""Router statistics counted again: literally, in float64, from what every adapted layer computed."""

from collections import defaultdict
from dataclasses import dataclass

import pytest
import torch

from comol_ds.adapters.comol_layer import CoMoLLinear


@dataclass
class Seen:
    """One forward pass of one layer, [N, ...] float64."""

    gates: torch.Tensor
    updates: torch.Tensor
    outputs: torch.Tensor
    cosine: float


class Recount:
    """Watches every CoMoL layer of a plain model, every time it is called.

    Args:
        model: with adapter "default", in one process.
        from_inputs: recompute h from the layer's input too, instead of taking the layer's (which dropout has changed).
    """

    def __init__(self, model: torch.nn.Module, from_inputs: bool = True) -> None:
        self.passes: dict[str, list[Seen]] = defaultdict(list)
        self._inputs: dict[str, torch.Tensor] = {}
        for name, layer in model.named_modules():
            if isinstance(layer, CoMoLLinear):
                self._watch(name.removeprefix("base_model.model."), layer, from_inputs)

    def _watch(self, name: str, layer: CoMoLLinear, from_inputs: bool) -> None:
        def keep_input(module, args):
            self._inputs[name] = args[0].detach()

        def keep(module, args, output):
            y, routed = output
            if not routed:
                return
            [(h, logits)] = routed
            x = self._inputs[name].flatten(0, -2).double()
            down, up, cores, router = (
                getattr(layer, parameter)["default"].detach().double()
                for parameter in ("comol_A", "comol_B", "comol_cores", "comol_router")
            )
            h = x @ down.T if from_inputs else h.detach().flatten(0, -2).double()
            gates = torch.softmax((h if logits is None else x) @ router.T, dim=1)
            merged = torch.einsum("ne,eij->nij", gates, cores)
            updates = layer.scaling["default"] * torch.einsum("ni,nij->nj", h, merged) @ up.T
            flat = cores.flatten(1)
            pairs = [(i, j) for i in range(len(flat)) for j in range(len(flat)) if i != j]
            cosine = sum(torch.cosine_similarity(flat[i], flat[j], dim=0).item() for i, j in pairs) / len(pairs)
            self.passes[name].append(Seen(gates, updates, y.detach().flatten(0, -2).double(), cosine))

        layer.register_forward_pre_hook(keep_input)
        layer.partial_sums.register_forward_hook(keep)

    def statistics(self, batches: list[dict], masks: list[torch.Tensor], detailed: list[bool] | None = None) -> dict:
        """What router_load.jsonl must say after these batches, the first passes seen; no task occurs in "other".

        Args:
            batches: with record_index and tasks.
            masks: [B, T] bool per batch, the tokens that count.
            detailed: of which batches updates and cores were measured; default all.
        """
        detailed = detailed or [True] * len(batches)
        owners = [token_tasks(batch) for batch in batches]
        tasks = sorted({task for batch in batches for task in batch["tasks"]})
        counted = [mask.flatten() for mask in masks]
        groups = {"all": counted}
        for task in tasks:
            groups[task] = [
                torch.tensor([owner == task for owner in names]) & mask
                for names, mask in zip(owners, counted, strict=True)
            ]
        tokens = {name: sum(int(mask.sum()) for mask in chosen) for name, chosen in groups.items()}
        layers = {}
        for layer, passes in self.passes.items():
            of_group = {name: _group(passes, chosen, detailed) for name, chosen in groups.items() if tokens[name]}
            overall = of_group.pop("all")
            cosines = [seen.cosine for seen, is_detailed in zip(passes, detailed, strict=False) if is_detailed]
            layers[layer] = overall | {
                "core_cosine": sum(cosines) / len(cosines) if cosines else None,
                "dead_experts": [expert for expert, gate in enumerate(overall["mean_gate"]) if gate < 0.01],
                "tasks": of_group,
            }
        return {"tokens": {name: number for name, number in tokens.items() if number}, "layers": layers}


def token_tasks(batch: dict) -> list[str | None]:
    """The task of every token, row after row; None in padding."""
    return [None if owner < 0 else batch["tasks"][owner] for owner in batch["record_index"].flatten().tolist()]


def _group(passes: list[Seen], chosen: list[torch.Tensor], detailed: list[bool]) -> dict:
    gates = torch.cat([seen.gates[mask] for seen, mask in zip(passes, chosen, strict=False)])  # n E
    mean = gates.mean(0)
    winner = gates.argmax(1)
    experts = gates.shape[1]
    measured = [
        (seen.updates[mask], seen.outputs[mask])
        for seen, mask, wanted in zip(passes, chosen, detailed, strict=False)
        if wanted
    ]
    update = sum(u.square().sum().item() for u, _ in measured)
    output = sum(y.square().sum().item() for _, y in measured)
    return {
        "mean_gate": mean.tolist(),
        "argmax_share": [(winner == expert).double().mean().item() for expert in range(experts)],
        "share_above_half": (gates > 0.5).double().mean(0).tolist(),
        "entropy": (-(gates * gates.log()).sum(1) / torch.log(torch.tensor(float(experts)))).mean().item(),
        "effective_experts": torch.exp(-(mean * mean.log()).sum()).item(),
        "cv": (mean.std(unbiased=False) / mean.mean()).item(),
        "max_min_ratio": (mean.max() / mean.min()).item(),
        "update_ratio": (update / output) ** 0.5 if output else None,
    }


def assert_same_statistics(found: dict, expected: dict, rel: float, absolute: float = 1e-7) -> None:
    """Every number of every layer and task."""
    assert found["tokens"] == expected["tokens"]
    assert list(found["layers"]) == list(expected["layers"])
    for layer, values in found["layers"].items():
        _assert_same(values, expected["layers"][layer], rel, absolute)


def _assert_same(found: dict, expected: dict, rel: float, absolute: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name == "tasks":
            assert found["tasks"].keys() == value.keys()
            for task in value:
                _assert_same(found["tasks"][task], value[task], rel, absolute)
        elif value is None or name == "dead_experts":
            assert found[name] == value
        else:
            assert found[name] == pytest.approx(value, rel=rel, abs=absolute), name
