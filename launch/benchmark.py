"""Measure this package against its neighbors.

Example: python launch/benchmark.py layer --json layer.json
"""

import argparse
import json
import sys
from pathlib import Path

import torch

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
    layer.add_argument("--json", type=Path, metavar="OUT", help="also write the results here")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    sizes = (options.tokens, options.in_features, options.out_features, options.r, options.num_experts)
    report = {"machine": machine(options.device), "results": []}
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    for dtype in options.dtypes:
        result = measure_layer(LayerCase(*sizes, dtype, options.device), options.rounds)
        report["results"].append(result)
        print(f"\n{table(result)}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
