"""CoMoL's equations (arXiv 2603.00573) written slowly and literally: one token at a time, plain matrix products."""

import torch


def comol_update(x, parameters, scale, router="core", masks=None):
    """s * (h M) B^T for every token of x [..., I].

    Args:
        parameters: comol_A [R, I], comol_B [O, R], comol_cores [E, R, R], comol_router [E, R] or [E, I].
        masks: already scaled dropout masks, one per token: "x" [N, I], "core" [N, R, R], "r" [N, R]; absent is ones.
    """
    masks = masks or {}
    a, b = parameters["comol_A"], parameters["comol_B"]
    cores, route = parameters["comol_cores"], parameters["comol_router"]
    rows = []
    for n, token in enumerate(x.reshape(-1, x.shape[-1])):
        dropped = token * masks["x"][n] if "x" in masks else token
        h = dropped @ a.T
        features = h if router == "core" else token
        p = torch.softmax(features @ route.T, dim=0)
        merged = sum(p[e] * cores[e] for e in range(len(cores)))
        if "core" in masks:
            merged = merged * masks["core"][n]
        v = h @ merged
        if "r" in masks:
            v = v * masks["r"][n]
        rows.append(scale * (v @ b.T))
    return torch.stack(rows).reshape(*x.shape[:-1], b.shape[0])


def random_parameters(table, sizes, seed=0, dtype=torch.float64):
    """Random tensors with the table's shapes, all of them non-zero so that every gradient is."""
    generator = torch.Generator().manual_seed(seed)
    return {
        parameter.name: torch.randn(parameter.shape(sizes), generator=generator, dtype=dtype) * 0.4
        for parameter in table
    }
