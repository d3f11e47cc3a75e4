"""A plan in words and as JSON."""

from dataclasses import asdict
from typing import Any

from comol_ds.planner.plan import Plan
from comol_ds.planner.search import RESERVED_FRACTION, Change, available

WIDTH = 100


def table(plan: Plan) -> str:
    """The whole plan, for people."""
    return "\n".join(
        [*_layout_lines(plan), "", *_memory_lines(plan), "", *_mode_lines(plan), "", *_communication_lines(plan)]
    )


def verdict(plan: Plan, device_memory: int, nearest: tuple[list[Change], Plan] | None) -> str:
    """Whether the plan fits, and if not, what would."""
    limit = (
        f"{size(available(device_memory))} ({size(device_memory)} less {RESERVED_FRACTION:.0%} for context and NCCL)"
    )
    if plan.peak <= available(device_memory):
        return f"fits: {size(plan.peak)} of {limit}"
    missing = f"does not fit: {size(plan.peak)} of {limit}"
    if nearest is None:
        return f"{missing}\nno change of checkpointing, micro-batch, layout or offload makes it fit: take more ranks"
    changes, changed = nearest
    host = f", {size(changed.host_of_node)} of host memory per node" if changed.host else ""
    lines = [f"nearest change that fits, with {size(changed.peak)}{host}:", *(f"  {c.words}" for c in changes)]
    return "\n".join([missing, *lines])


def as_json(
    plan: Plan, device_memory: int | None = None, nearest: tuple[list[Change], Plan] | None = None
) -> dict[str, Any]:
    """The whole plan, for programs; memory in bytes. Without ``device_memory`` nothing is said about fitting."""
    report = {
        "layout": _layout(plan),
        "parameters": {
            "trainable": plan.trainable,
            "frozen": plan.everything - plan.trainable,
            "rank_trainable": plan.local_trainable,
            "rank_frozen": plan.local_everything - plan.local_trainable,
        },
        "device_bytes": {**dict(_device_rows(plan)), "update_temporaries": plan.step, "peak": plan.peak},
        "host_bytes": {**dict(_host_rows(plan)), "per_rank": plan.host, "per_node": plan.host_of_node},
        "loading_bytes": {"device": plan.loading_device, "host": plan.loading_host},
        "saved_activations_bytes": {mode: kept.kept for mode, kept in plan.other_modes.items()},
        "communication_per_step": [asdict(traffic) for traffic in plan.traffic],
    }
    if device_memory is not None:
        report["device_memory_bytes"] = device_memory
        report["available_bytes"] = available(device_memory)
        report["fits"] = plan.peak <= available(device_memory)
        report["nearest_change"] = nearest and {
            "changes": [change.words for change in nearest[0]],
            "peak": nearest[1].peak,
            "host_per_node": nearest[1].host_of_node,
        }
    return report


def size(nbytes: int) -> str:
    """1610612736 -> "1.50 GiB", 1572864 -> "1.5 MiB"."""
    return f"{nbytes / 2**30:,.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"


def _layout(plan: Plan) -> dict[str, Any]:
    request, model = plan.request, plan.request.config.model
    return {
        "model": str(model.model_name_or_path),
        "world_size": request.grid.size,
        "nodes": request.grid.size // request.ranks_per_node,
        "data_parallel": request.grid.data_parallel,
        "tensor_parallel": request.grid.tensor_parallel,
        "zero_stage": request.stage,
        "dtype": str(request.dtype).removeprefix("torch."),
        "micro_batch": request.batches.micro_batch,
        "accumulation": request.batches.accumulation,
        "global_batch": request.batches.global_batch,
        "max_length": request.config.data.max_length,
        "activation_checkpointing": model.activation_checkpointing,
        "activation_offload": model.activation_offload,
        "partition_activations": model.partition_activations,
    }


def _layout_lines(plan: Plan) -> list[str]:
    values = _layout(plan)
    return [
        f"{values['model']}",
        f"{values['world_size']} ranks, {values['nodes']} x {plan.request.ranks_per_node} on each node:"
        f" {values['tensor_parallel']} tensor-parallel x"
        f" {values['data_parallel']} data-parallel, ZeRO stage {values['zero_stage']}, {values['dtype']}",
        f"batches: {plan.request.batches}; rows of {values['max_length']} tokens",
        f"activation checkpointing {values['activation_checkpointing']}, offload {values['activation_offload']}",
        f"parameters: {plan.trainable:,d} trainable, {plan.everything - plan.trainable:,d} frozen",
        f"of which a rank's tensor-parallel slice has {plan.local_trainable:,d} trainable,"
        f" {plan.local_everything - plan.local_trainable:,d} frozen",
    ]


_DEVICE_ROWS = {
    "frozen_weights": "frozen weights",
    "adapter": "adapter, working copy",
    "gradients": "adapter gradients",
    "optimizer_master": "optimizer: fp32 master copy",
    "optimizer_moments": "optimizer: moments",
    "gathered_weights": "gathered weights (ZeRO-3)",
    "saved_by_layers": "saved activations: decoder layers",
    "saved_by_head_and_loss": "saved activations: final norm, head, logits",
    "masks_and_positions": "masks and position tables",
    "working_tensors": "working tensors of the passes",
    "gradient_buckets": "gradient buckets",
}


def _device_rows(plan: Plan) -> list[tuple[str, int]]:
    held, kept = plan.held, plan.activations
    values = (
        held.frozen["none"],
        held.adapter["none"],
        held.gradients["none"],
        held.master["none"],
        held.moments["none"],
        plan.gathering.computing,
        kept.layers,
        kept.ends,
        kept.shared,
        plan.working,
        plan.buffers,
    )
    return list(zip(_DEVICE_ROWS, values, strict=True))


def _host_rows(plan: Plan) -> list[tuple[str, int]]:
    held = plan.held
    values = (
        held.frozen["cpu"],
        held.adapter["cpu"],
        held.gradients["cpu"],
        held.master["cpu"],
        held.moments["cpu"],
        0,
        plan.activations.host,
    )
    return [(name, value) for name, value in zip(_DEVICE_ROWS, values, strict=False) if name != "gathered_weights"]


def _memory_lines(plan: Plan) -> list[str]:
    host = dict(_host_rows(plan))
    lines = [_row("memory per rank, planned", "device", "host")]
    for name, nbytes in _device_rows(plan):
        lines.append(_row(_DEVICE_ROWS[name], size(nbytes), size(host[name]) if host.get(name) else ""))
    in_update = ", in the optimizer's update" if plan.step > plan.passes else ""
    lines.append(_row(f"peak{in_update}", size(plan.peak), size(plan.host)))
    lines.append(_row("while loading", size(plan.loading_device), size(plan.loading_host)))
    return lines


def _mode_lines(plan: Plan) -> list[str]:
    lines = [_row("activations by --activation_checkpointing", "saved", "working")]
    for mode, kept in plan.other_modes.items():
        lines.append(_row(f"  {mode}", size(kept.kept), size(kept.working)))
    return lines


def _communication_lines(plan: Plan) -> list[str]:
    lines = [_row("communication per optimizer step and rank", "collectives", "tensors", "sent")]
    for kind in plan.traffic:
        lines.append(_row(kind.kind, f"{kind.collectives:,d}", size(kind.nbytes), size(kind.sent)))
    return lines if plan.traffic else ["no communication"]


def _row(name: str, *values: str) -> str:
    return f"{name:<{WIDTH - 3 * 16}}{''.join(f'{value:>16}' for value in values)}".rstrip()
