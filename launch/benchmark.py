"""Measure this package against its neighbors.

Examples: python launch/benchmark.py layer --json layer.json
          python launch/benchmark.py load --gigabytes 2 --json load.json
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

from comol_ds.benchmark import load
from comol_ds.benchmark.layer import DTYPES, LayerCase, machine, measure_layer, table


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
    for suite in (layer, loading):
        suite.add_argument("--json", type=Path, metavar="OUT", help="also write the results here")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    report = {"layer": run_layer, "load": run_load}[options.suite](options)
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
        result = load.measure_load(case, options.rounds)
    report = {"machine": machine("cuda" if torch.cuda.is_available() else "cpu"), "results": [result]}
    print(load.table(result), flush=True)
    return report


if __name__ == "__main__":
    sys.exit(main())
