"""Every layout loads what transformers loads, bit for bit, reading only its own part; a fault on one rank stops all."""

import copy
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.data.data_helpers import write_jsonl
from tests.distributed.launching import run_deepspeed
from tests.distributed.refused_runs import refused_run
from tests.tiny_models import FAMILIES, save_tiny_model

pytestmark = pytest.mark.distributed


@dataclass(frozen=True)
class LoadCase:
    """One layout of two ranks."""

    family: str
    tensor_parallel: int
    stage: int
    bf16: bool
    train_head: bool = False
    zero: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        return "-".join(map(str, asdict(self).values()))


LOAD_CASES = [
    *(
        LoadCase(family, tensor_parallel, stage, bf16)
        for family in ("llama_files", "llama_tied", "llama_odd_vocabulary")
        for tensor_parallel in (1, 2)
        for stage in (0, 3)
        for bf16 in (False, True)
    ),
    *(LoadCase(family, 2, 3, True) for family in ("llama_bias", "qwen3", "gemma3")),
    *(LoadCase(family, 1, stage, False, train_head=True) for family in ("llama", "llama_tied") for stage in (0, 3)),
    LoadCase("llama_padded", 1, 3, False, zero={"offload_param": {"device": "cpu"}}),
    # DeepSpeed makes hpZ's groups once per process
    LoadCase("llama_padded", 1, 3, True, zero={"zero_hpz_partition_size": 2}),
]


@pytest.fixture(scope="module")
def reports(tmp_path_factory, extensions) -> list[dict]:
    """What each of two ranks found; the processes start once."""
    folder = tmp_path_factory.mktemp("loading")
    for family in ("llama", "llama_tied", "llama_odd_vocabulary", "llama_bias", "qwen3", "gemma3"):
        save_tiny_model(folder / family, family)
    # biases of 47 numbers, which two ranks share as 24 and 23
    padded = copy.deepcopy(FAMILIES["llama_bias"])
    padded.intermediate_size = 47
    model = AutoModelForCausalLM.from_config(padded)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.mlp.up_proj.bias)
    model.save_pretrained(folder / "llama_padded")
    # three shards, with an index
    AutoModelForCausalLM.from_pretrained(folder / "llama").save_pretrained(
        folder / "llama_files", max_shard_size="60KB"
    )
    save_tiny_model(folder / "incomplete")
    file = folder / "incomplete" / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if name != "model.norm.weight"}, file)
    run = run_deepspeed(2, Path(__file__).parent / "loading_worker.py", [str(folder), str(folder)], extensions)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("case", LOAD_CASES, ids=lambda case: case.name)
def test_parameters_and_buffers_equal_transformers_loading_bit_for_bit(case, reports):
    assert [report[case.name]["wrong"] for report in reports] == [[], []]


@pytest.mark.parametrize("case", LOAD_CASES, ids=lambda case: case.name)
def test_a_rank_reads_what_it_holds_and_no_more(case, reports):
    copies = 2 if case.zero.get("zero_hpz_partition_size") else 1  # hpZ's is as large here
    for report in reports:
        asked, held = report[case.name]["asked"], report[case.name]["held"] * copies
        assert 0.99 * held <= asked <= held  # the padding of the last partition is not in the files


@pytest.mark.parametrize(
    ("what", "told"),
    [
        # which of the tensors that cannot be read is told first is the threads' affair
        ("disk error", r"llama/model.safetensors: tensor '\S+' cannot be read: \[Errno 5\] Input/output"),
        ("cut", r"before the tensor does; check the disk, copy or download the file again"),
        ("missing tensor", r"incomplete/model.safetensors has no tensor 'model.norm.weight', the nearest is "),
    ],
)
def test_a_fault_on_one_rank_is_told_to_all_and_nobody_waits(what, told, reports):
    messages = {report["faults"][what] for report in reports}
    assert len(messages) == 1, messages
    assert re.search(told, messages.pop())


@pytest.mark.slow
def test_a_damaged_file_ends_a_launched_run_with_one_line(tmp_path, extensions):
    model, data = save_tiny_model(tmp_path / "model"), tmp_path / "records.jsonl"
    write_jsonl(data, [{"prompt": "a", "completion": "b"}] * 20)
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    _, told = refused_run(model, data, tmp_path / "out", extensions)
    assert len(told) == 1 and f"{file} cannot be read as safetensors, copy or download it again: tensor" in told[0]
