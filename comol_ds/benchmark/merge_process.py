"""One run of the merging benchmark: copies or merges and prints, as JSON, what it took.

Usage: python -m comol_ds.benchmark.merge_process {copy,merge} BASE_FOLDER LORA_FILE OUTPUT_FOLDER
"""

import json
import shutil
import sys
import time
from pathlib import Path

from safetensors.torch import load_file

from comol_ds.export.dense_merge import merge_into_base
from comol_ds.export.static_lora import StaticLora
from comol_ds.files import sync


def copy_files(base: Path, output: Path) -> None:
    output.mkdir()
    for file in sorted(base.iterdir()):
        shutil.copyfile(file, output / file.name)
        sync(output / file.name)
    sync(output)


def read_lora(file: Path) -> StaticLora:
    tensors = load_file(file)
    modules = sorted({name.rpartition(".")[0] for name in tensors})
    down = {module: tensors[f"{module}.down"] for module in modules}
    return StaticLora(down, {module: tensors[f"{module}.up"] for module in modules}, len(down[modules[0]]))


def resident_bytes(field: str) -> int:
    """VmRSS, or its high-water mark VmHWM, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def main() -> None:
    contender, base, lora, output = sys.argv[1], *map(Path, sys.argv[2:])
    static = read_lora(lora)
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
    before, start, worked = resident_bytes("VmRSS"), time.perf_counter(), time.process_time()
    if contender == "merge":
        merge_into_base(base, static, output)
    else:
        copy_files(base, output)
    times = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - worked}
    print(json.dumps(times | {"peak_bytes": resident_bytes("VmHWM") - before}))


if __name__ == "__main__":
    main()
