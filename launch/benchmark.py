"""Measure this package against its neighbors.

Examples: python launch/benchmark.py layer --json layer.json
          python launch/benchmark.py load --gigabytes 2 --json load.json
          python launch/benchmark.py geometry --layers 2 --ranks 2 --json geometry.json
          python launch/benchmark.py router-load --json router_load.json
          python launch/benchmark.py merge --rounds 5 --json merge.json
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from comol_ds.benchmark import load
from comol_ds.benchmark.figures import machine
from comol_ds.benchmark.layer import DTYPES, LayerCase, measure_layer, table


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    suites = parser.add_subparsers(dest="suite", required=True)
    layer = suites.add_parser(
        "layer",
        help="one adapted Linear: adapter path's time and bytes kept for backward, for CoMoL, LoRA, materialised cores",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    layer.add_argument("--tokens", type=int, default=2048, help="N")
    layer.add_argument("--in_features", type=int, default=8192)
    layer.add_argument("--out_features", type=int, default=8192)
    layer.add_argument("--r", type=int, default=64, help="rank")
    layer.add_argument("--num_experts", type=int, default=8)
    layer.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), metavar="DTYPE")
    layer.add_argument("--rounds", type=int, default=15, help="timed turns of every contender, after 3 for warming up")
    layer.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    loading = suites.add_parser(
        "load",
        help="a checkpoint on several ranks: seconds, bytes read and host memory, beside transformers under ZeRO-3",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    loading.add_argument("--gigabytes", type=float, default=2.0, help="size of the random bf16 checkpoint, in 2^30")
    loading.add_argument("--ranks", type=int, default=2)
    loading.add_argument("--rounds", type=int, default=3, help="loads of every contender")
    loading.add_argument("--folder", type=Path, help="an existing folder on the disk to measure; default: temporary")
    model = suites.add_parser(
        "geometry",
        help="Llama-3.1-70B's geometry with few layers and random weights: steps and memory under ZeRO-3 and under TP",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    model.add_argument("--layers", type=int, default=2, help="decoder layers, of 80")
    model.add_argument("--ranks", type=int, default=2, help="processes, one GPU each where there are some")
    model.add_argument("--steps", type=int, default=3)
    model.add_argument("--tokens", type=int, default=64, help="of a row")
    routers = suites.add_parser(
        "router-load",
        help="training steps with router statistics and without",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    routers.add_argument("--hidden", type=int, default=1024, help="hidden size")
    routers.add_argument("--layers", type=int, default=4, help="decoder layers")
    routers.add_argument("--tokens", type=int, default=1024, help="of a step")
    routers.add_argument("--num_experts", type=int, default=8)
    routers.add_argument(
        "--rounds", type=int, default=15, help="timed steps of every contender, after 2 for warming up"
    )
    merging = suites.add_parser(
        "merge",
        help="a static LoRA merged into a checkpoint: speed beside copying its files, memory, and all bits",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    merging.add_argument("--gigabytes", type=float, default=2.0, help="size of the random bf16 checkpoint, in 2^30")
    merging.add_argument("--r", type=int, default=16, help="rank")
    merging.add_argument("--rounds", type=int, default=5, help="copies and merges, with a warm page cache and a cold")
    merging.add_argument("--folder", type=Path, help="an existing folder on the disk to measure; default: temporary")
    for suite in (layer, loading, model, routers, merging):
        suite.add_argument("--json", type=Path, metavar="OUT", help="also write the results here")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    run = {
        "layer": run_layer, "load": run_load, "geometry": run_geometry, "router-load": run_router_load,
        "merge": run_merge,
    }  # fmt: skip
    report = run[options.suite](options)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def run_layer(options: argparse.Namespace) -> dict:
    sizes = (options.tokens, options.in_features, options.out_features, options.r, options.num_experts)
    report = {"machine": machine(options.device), "results": []}
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    for dtype in options.dtypes:
        result = measure_layer(LayerCase(*sizes, dtype, options.device), options.rounds)
        report["results"].append(result)
        print(f"\n{table(result)}", flush=True)
    return report


def run_load(options: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        case = load.LoadCase(Path(folder), options.gigabytes, options.ranks)
        return report_on(load.measure_load(case, options.rounds), load.table)


def run_geometry(options: argparse.Namespace) -> dict:
    from comol_ds.benchmark import geometry  # and with it DeepSpeed, which the other suites need not wait for

    with tempfile.TemporaryDirectory() as folder:
        sizes = (options.layers, options.ranks, options.steps, options.tokens)
        result = geometry.measure_geometry(geometry.GeometryCase(Path(folder), *sizes))
        return report_on(result, geometry.table)


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


def report_on(result: dict, table: Callable[[dict], str]) -> dict:
    """Print a suite's one result; what --json writes of it."""
    print(table(result), flush=True)
    return {"machine": machine("cuda" if torch.cuda.is_available() else "cpu"), "results": [result]}


if __name__ == "__main__":
    sys.exit(main())
