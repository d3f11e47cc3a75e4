"""Fails unless the default run ended with accuracy above its start on every task, and half the loss.

Usage: check_demo.py RUN [GAIN], the gain in accuracy that is asked of every task, as a fraction of the answers.
"""

import json
import sys
from pathlib import Path

GAIN = 0.2


def main(run: Path, gain: float) -> int:
    lines = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    before, after = lines[0]["tasks"], lines[-1]["tasks"]
    poor = {
        task: (before[task]["exact_match"], score["exact_match"])
        for task, score in after.items()
        if score["exact_match"] < before[task]["exact_match"] + gain or score["loss"] > before[task]["loss"] / 2
    }
    if poor:
        print(f"accuracy rose by less than {gain:.0%}, or the loss did not halve, in {poor}")
        return 1
    seconds = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["seconds"]
    print(f"better in all of {', '.join(after)}; training took {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else GAIN))
