"""Measure this package against its neighbors.

Examples: python launch/benchmark.py layer --json layer.json
          python launch/benchmark.py step --layouts zero3-2 --geometries tiny --json step.json
          python launch/benchmark.py collectives --json collectives.json
          python launch/benchmark.py load --gigabytes 2 --json load.json
          python launch/benchmark.py geometry --layers 2 --ranks 2 --json geometry.json
          python launch/benchmark.py plan --json plan.json
          python launch/benchmark.py router-load --json router_load.json
          python launch/benchmark.py merge --rounds 5 --json merge.json
          python launch/benchmark.py gpu --json gpu.json

Exit codes: 0 measured; 2 bad input, on one line.
"""

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from comol_ds.benchmark import gpu_rates, layer_profile, load, siblings
from comol_ds.benchmark.contenders import CONTENDERS, DTYPES, LayerCase
from comol_ds.benchmark.figures import machine
from comol_ds.benchmark.layer import measure_layer, table
from comol_ds.errors import UserError

EXIT_BAD_INPUT = 2

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# DeepSpeed's seconds of importing are not worth a help text
LAYOUTS = ("zero3-1", "zero3-2", "tp2")
STEP_CONTENDERS = ("comol", "lora", "molora", "hydralora", "frozen")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    suites = parser.add_subparsers(dest="suite", required=True)
    for name, (declare, _, what) in SUITES.items():
        suite = suites.add_parser(name, help=what, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        declare(suite)
        suite.add_argument("--json", type=Path, metavar="OUT", help="also write the results here")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    _, run, _ = SUITES[options.suite]
    try:
        report = run(options)
    except UserError as error:
        print(f"benchmark.py: error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def layer_flags(suite: argparse.ArgumentParser) -> None:
    suite.add_argument("--tokens", type=int, default=512, help="N")
    suite.add_argument("--in_features", type=int, default=8192)
    suite.add_argument("--out_features", type=int, nargs="+", default=[8192, 28672])
    suite.add_argument("--r", type=int, nargs="+", default=[16, 64], help="ranks")
    suite.add_argument("--num_experts", type=int, nargs="+", default=[8, 32])
    suite.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), metavar="DTYPE")
    suite.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    suite.add_argument("--rounds", type=int, default=15, help="timed turns of every contender, after 3 for warming up")
    suite.add_argument("--seconds", type=float, default=3.0, help="of a slow contender, which has at least 3 turns")
    suite.add_argument("--profile", action="store_true", help="also print where CoMoL's and LoRA's time goes")
    suite.add_argument("--device", choices=("cpu", "cuda"), default=DEVICE)


def siblings_flags(suite: argparse.ArgumentParser) -> None:
    suite.add_argument("--tokens", type=int, default=512, help="N")
    suite.add_argument("--r", type=int, nargs="+", default=[16, 64], help="ranks")
    suite.add_argument("--num_experts", type=int, nargs="+", default=[8, 32])
    suite.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), metavar="DTYPE")
    suite.add_argument("--rounds", type=int, default=15, help="timed turns of every contender, after 3 for warming up")
    suite.add_argument("--device", choices=("cpu", "cuda"), default=DEVICE)


def step_flags(suite: argparse.ArgumentParser) -> None:
    suite.add_argument("--geometries", nargs="+", choices=("tiny", "70b"), default=["tiny", "70b"], metavar="NAME")
    suite.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), metavar="NAME")
    suite.add_argument(
        "--contenders",
        nargs="+",
        choices=STEP_CONTENDERS,
        metavar="NAME",
        help="default: all that the layout has; of 70b under zero3-2, where a step takes long, CoMoL and LoRA",
    )
    suite.add_argument("--hidden", type=int, help="hidden size; default: the geometry's, as for the next two")
    suite.add_argument("--layers", type=int, help="decoder layers")
    suite.add_argument("--tokens", type=int, help="of a data-parallel rank and step")
    suite.add_argument("--r", type=int, nargs="+", default=[16], help="ranks")
    suite.add_argument("--num_experts", type=int, nargs="+", default=[8])
    suite.add_argument("--rounds", type=int, default=5, help="timed steps of every contender, after 1 for warming up")


def collectives_flags(suite: argparse.ArgumentParser) -> None:
    suite.add_argument("--hidden", type=int, default=1024, help="hidden size")
    suite.add_argument("--layers", type=int, default=2, help="decoder layers")
    suite.add_argument("--tokens", type=int, default=64, help="of a data-parallel rank and step")
    suite.add_argument("--r", type=int, default=16, help="rank")
    suite.add_argument("--num_experts", type=int, default=8)


def load_flags(suite: argparse.ArgumentParser) -> None:
    suite.add_argument("--gigabytes", type=float, default=2.0, help="size of the random bf16 checkpoint, in 2^30")
    suite.add_argument("--ranks", type=int, default=2)
    suite.add_argument("--rounds", type=int, default=3, help="loads of every contender")
    suite.add_argument("--folder", type=Path, help="an existing folder on the disk to measure; default: temporary")


def geometry_flags(suite: argparse.ArgumentParser) -> None:
    suite.add_argument("--layers", type=int, default=2, help="decoder layers, of 80")
    suite.add_argument("--ranks", type=int, default=2, help="processes, one GPU each where there are some")
    suite.add_argument("--steps", type=int, default=3)
    suite.add_argument("--tokens", type=int, default=64, help="of a row")


def plan_flags(suite: argparse.ArgumentParser) -> None:
    suite.add_argument("--ranks", type=int, default=8)
    suite.add_argument("--tokens", type=int, default=4096, help="of a row")
    suite.add_argument("--rounds", type=int, default=3, help="runs of the command")


def router_load_flags(suite: argparse.ArgumentParser) -> None:
    suite.add_argument("--hidden", type=int, default=1024, help="hidden size")
    suite.add_argument("--layers", type=int, default=4, help="decoder layers")
    suite.add_argument("--tokens", type=int, default=1024, help="of a step")
    suite.add_argument("--num_experts", type=int, default=8)
    suite.add_argument("--rounds", type=int, default=15, help="timed steps of every contender, after 2 for warming up")


def merge_flags(suite: argparse.ArgumentParser) -> None:
    suite.add_argument("--gigabytes", type=float, default=2.0, help="size of the random bf16 checkpoint, in 2^30")
    suite.add_argument("--r", type=int, default=16, help="rank")
    suite.add_argument("--rounds", type=int, default=5, help="copies and merges, with a warm page cache and a cold")
    suite.add_argument("--folder", type=Path, help="an existing folder on the disk to measure; default: temporary")


def gpu_flags(suite: argparse.ArgumentParser) -> None:
    suite.add_argument(
        "--layers", type=int, choices=range(1, 81), metavar="L", help="of the 70B model; default: the most that fit"
    )
    suite.add_argument("--tokens", type=int, default=2048, help="of a row; the 70B model's steps have 1, the others 4")
    suite.add_argument("--ratio_layers", type=int, default=4, help="of each model in the comparison with LoRA")
    suite.add_argument("--peak_tflops", type=float, help="the GPU's in dense bf16; default: its data sheet's, if known")
    suite.add_argument("--rounds", type=int, default=10, help="timed turns of every contender")


def run_layer(options: argparse.Namespace) -> dict:
    report = {"machine": machine(options.device), "results": []}
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    for out_features, dtype in itertools.product(options.out_features, options.dtypes):
        names = list(dict.fromkeys(["lora", *options.contenders]))
        for r, num_experts in itertools.product(options.r, options.num_experts):
            case = LayerCase(options.tokens, options.in_features, out_features, r, num_experts, dtype, options.device)
            report["results"].append(measure_layer(case, options.rounds, names, seconds=options.seconds))
            print(f"\n{table(report['results'][-1])}", flush=True)
            if options.profile:
                profiles = {name: layer_profile.profile_layer(case, name) for name in ("comol", "lora")}
                report["results"][-1]["profile"] = profiles
                print("\n".join(layer_profile.table(*profile) for profile in profiles.items()), flush=True)
            names = [name for name in names if name != "base"]  # it knows neither r nor E
    return report


def run_siblings(options: argparse.Namespace) -> dict:
    results = []
    cases = itertools.product(siblings.SIBLINGS, options.dtypes, options.r, options.num_experts)
    for names, dtype, r, num_experts in cases:
        case = siblings.SiblingsCase(
            names,
            tuple(siblings.OUT_FEATURES[name] for name in names),
            tokens=options.tokens,
            r=r,
            num_experts=num_experts,
            dtype=dtype,
            device=options.device,
        )
        results.append(siblings.measure_siblings(case, options.rounds))
        print(siblings.table(results[-1]), flush=True)
    return report_of(results, options.device)


def run_step(options: argparse.Namespace) -> dict:
    from comol_ds.benchmark import step  # and with it DeepSpeed, which the other suites need not wait for

    asked = {name: getattr(options, name) for name in ("hidden", "layers", "tokens")}
    asked = {name: value for name, value in asked.items() if value is not None}
    results = []
    cases = itertools.product(options.geometries, options.layouts, options.r, options.num_experts)
    for geometry, layout, r, num_experts in cases:
        case = replace(step.GEOMETRIES[geometry], r=r, num_experts=num_experts, **asked)
        is_long = (geometry, layout) == ("70b", "zero3-2")
        names = options.contenders or (STEP_CONTENDERS[:2] if is_long else STEP_CONTENDERS)
        with tempfile.TemporaryDirectory() as folder:
            results.append(step.measure_step(case, layout, Path(folder), names, options.rounds))
        print(f"{geometry}, {step.table(results[-1])}\n", flush=True)
    return report_of(results)


def run_collectives(options: argparse.Namespace) -> dict:
    from comol_ds.benchmark import collectives
    from comol_ds.benchmark.whole_models import ModelCase

    sizes = {name: getattr(options, name) for name in ("hidden", "layers", "tokens", "r", "num_experts")}
    case = ModelCase(**sizes, intermediate=3 * options.hidden)
    results = []
    for layout in collectives.CONTENDERS:
        with tempfile.TemporaryDirectory() as folder:
            results.append(collectives.measure_collectives(case, layout, Path(folder)))
        print(f"{collectives.table(results[-1])}\n", flush=True)
    return report_of(results)


def run_load(options: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        case = load.LoadCase(Path(folder), options.gigabytes, options.ranks)
        return report_on(load.measure_load(case, options.rounds), load.table)


def run_geometry(options: argparse.Namespace) -> dict:
    from comol_ds.benchmark import geometry

    with tempfile.TemporaryDirectory() as folder:
        sizes = (options.layers, options.ranks, options.steps, options.tokens)
        result = geometry.measure_geometry(geometry.GeometryCase(Path(folder), *sizes))
        return report_on(result, geometry.table)


def run_plan(options: argparse.Namespace) -> dict:
    from comol_ds.benchmark import planning

    with tempfile.TemporaryDirectory() as folder:
        case = planning.PlanningCase(Path(folder), options.ranks, options.tokens)
        return report_on(planning.measure_planning(case, options.rounds), planning.table)


def run_router_load(options: argparse.Namespace) -> dict:
    from comol_ds.benchmark import router_load

    with tempfile.TemporaryDirectory() as folder:
        sizes = (options.hidden, options.layers, options.tokens, options.num_experts)
        result = router_load.measure_router_load(router_load.RouterLoadCase(Path(folder), *sizes), options.rounds)
        return report_on(result, router_load.table)


def run_merge(options: argparse.Namespace) -> dict:
    from comol_ds.benchmark import merge

    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        case = merge.MergeCase(Path(folder), options.gigabytes, options.r)
        return report_on(merge.measure_merge(case, options.rounds), merge.table)


def run_gpu(options: argparse.Namespace) -> dict:
    gpu_rates.check_cuda()  # before DeepSpeed, which says on import what it found
    from comol_ds.benchmark import gpu

    sizes = (options.layers, options.tokens, options.ratio_layers, options.rounds, options.peak_tflops)
    with tempfile.TemporaryDirectory() as folder:
        return report_of([gpu.measure_gpu(gpu.GpuCase(Path(folder), *sizes))])


def report_on(result: dict, table: Callable[[dict], str]) -> dict:
    """Print a suite's one result; what --json writes of it."""
    print(table(result), flush=True)
    return report_of([result])


def report_of(results: list[dict], device: str = DEVICE) -> dict:
    """What --json writes."""
    return {"machine": machine(device), "results": results}


# name -> what declares its flags, what runs it, and what it measures
SUITES: dict[str, tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], dict], str]] = {
    "layer": (
        layer_flags,
        run_layer,
        "one adapted Linear: adapter path's time, FLOPs and memory, for CoMoL, LoRA and other mixtures",
    ),
    "siblings": (
        siblings_flags,
        run_siblings,
        "adapter paths of q, k, v and of gate, up: one product with all A, one for each, and LoRA",
    ),
    "step": (
        step_flags,
        run_step,
        "whole training steps of a random Llama under ZeRO-3 and TP, for CoMoL, LoRA, MoLoRA and the frozen base",
    ),
    "collectives": (
        collectives_flags,
        run_collectives,
        "calls and bytes that a training step sends, under ZeRO-3 beside LoRA and under TP beside the frozen base",
    ),
    "load": (
        load_flags,
        run_load,
        "a checkpoint on several ranks: seconds, bytes read and host memory, beside transformers under ZeRO-3",
    ),
    "geometry": (
        geometry_flags,
        run_geometry,
        "Llama-3.1-70B's geometry with few layers and random weights: steps and memory under ZeRO-3 and under TP",
    ),
    "plan": (
        plan_flags,
        run_plan,
        "launch/plan.py on Llama-3.1-70B's geometry: seconds of the command, and its memory",
    ),
    "router-load": (
        router_load_flags,
        run_router_load,
        "training steps with router statistics and without",
    ),
    "merge": (
        merge_flags,
        run_merge,
        "a static LoRA merged into a checkpoint: speed beside copying its files, memory, and all bits",
    ),
    "gpu": (
        gpu_flags,
        run_gpu,
        "one CUDA GPU: kernels beside its bandwidth and cuBLAS, steps beside LoRA, and as much of a 70B as fits",
    ),
}


if __name__ == "__main__":
    sys.exit(main())
