"""Fails unless the default run ended with accuracy clearly above its start on every task. Usage: check_demo.py RUN"""

import json
import sys
from pathlib import Path

GAIN = 0.2  # of the answers, in every task


def main(run: Path) -> int:
    lines = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    before, after = lines[0]["tasks"], lines[-1]["tasks"]
    poor = {
        task: (before[task]["exact_match"], score["exact_match"])
        for task, score in after.items()
        if score["exact_match"] < before[task]["exact_match"] + GAIN
    }
    if poor:
        print(f"accuracy rose by less than {GAIN:.0%} in {poor}")
        return 1
    seconds = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["seconds"]
    print(f"accuracy rose in all of {', '.join(after)}; training took {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
