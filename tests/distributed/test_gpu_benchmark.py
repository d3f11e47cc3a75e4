"""The gpu suite's training parts without a GPU: ratios, the search for what fits, and what runs out of memory."""

import os
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig

from comol_ds.benchmark import geometry, gpu, gpu_size, step
from comol_ds.benchmark.gpu_rates import RatesCase
from comol_ds.benchmark.mfu import flops_per_token
from comol_ds.benchmark.processes import run_ranks
from comol_ds.benchmark.whole_models import VOCABULARY, ModelCase
from comol_ds.errors import UserError

TINY = geometry.LLAMA_3_1_70B | {
    "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 1024,
}  # fmt: skip
SMALL = ModelCase(hidden=64, intermediate=96, heads=8, key_value_heads=2, layers=2, tokens=64, bf16=True)
OUT_OF_MEMORY = "zero3 failed with exit code 1:\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"


@pytest.fixture
def tiny(monkeypatch):
    """A geometry that can be planned and trained anywhere."""
    monkeypatch.setattr(geometry, "LLAMA_3_1_70B", TINY)


@pytest.fixture
def trained(monkeypatch):
    """Puts a run with room for so many layers in the place of launch/train.py; returns the environments it is given."""

    def install(room: int, error: str = OUT_OF_MEMORY) -> list[dict[str, str]]:
        environments = []

        def train_layout(case: geometry.GeometryCase, environment: dict[str, str]) -> dict:
            environments.append(environment)
            if case.layers > room:
                raise RuntimeError(error)
            return {"seconds": [9.0, 2.0, 1.0, 4.0], "tokens_per_step": case.tokens, "peak_bytes": [12345]}

        monkeypatch.setattr(geometry, "train_layout", train_layout)
        return environments

    return install


@pytest.mark.slow
def test_most_layers_are_those_whose_planned_peak_fits(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_size, "MOST_LAYERS", 4)
    peaks = [geometry.plan_layout(gpu_size._case(tmp_path, layers, 16)).peak for layers in range(1, 5)]
    assert peaks == sorted(set(peaks)), "the search takes it that each layer needs more"
    monkeypatch.setattr(geometry, "plan_layout", lambda case: SimpleNamespace(peak=peaks[case.layers - 1]))
    fitting = {budget: gpu_size.most_layers(tmp_path, 16, budget) for budget in (peaks[2], peaks[2] - 1, 2**40)}
    assert fitting == {peaks[2]: 3, peaks[2] - 1: 2, 2**40: 4}


def test_a_device_too_small_for_a_layer_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_size, "MOST_LAYERS", 1)
    with pytest.raises(UserError) as refusal:
        gpu_size.most_layers(tmp_path, 2048, 2**30)
    assert str(refusal.value) == (
        "one layer of Llama-3.1-70B needs 6.6 GiB and the device has 1.0 GiB free: end what else runs on it, or take"
        " fewer --tokens than 2048"
    )


@pytest.mark.slow
def test_the_planner_sees_room_for_all_of_70b_on_an_h200(tmp_path):
    plan = geometry.plan_layout(gpu_size._case(tmp_path, gpu_size.MOST_LAYERS, 2048))
    assert 131 * 2**30 < plan.peak < 139 * 2**30


@pytest.mark.slow
def test_a_run_out_of_memory_is_told_and_fewer_layers_are_tried(tiny, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    environments = trained(room=5)
    size = gpu_size.measure_size(tmp_path, 12, 16)
    assert (size["layers"], size["out_of_memory"]) == (4, [12, 8])
    assert environments == [{"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}] * 3
    assert size["median_seconds"] == 2, "the first step warms up"
    assert (size["tokens_per_second"], size["peak_bytes"]) == (8, 12345)
    assert size["flops_per_second"] == 8 * flops_per_token(LlamaConfig(**TINY, num_hidden_layers=4), 16)
    assert size["parameters"] == 2 * 1024 * 64 + 4 * (2 * 64 * 64 + 2 * 64 * 16 + 3 * 64 * 96 + 2 * 64) + 64
    assert size["planned_peak_bytes"] == geometry.plan_layout(gpu_size._case(tmp_path, 4, 16)).peak
    assert "12 layers: out of memory\ntraining 8 layers, planned peak" in capsys.readouterr().out
    told = gpu.size_table(size | {"free_bytes": 2**31, "mfu": None, "of_products": 0.5})
    assert "4 of 80 layers; 12 layers: out of memory; 8 layers: out of memory" in told
    assert "2.00 s per step, 8 tokens/s, MFU -, 50.0% of the measured rate" in told


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "error"), [(4, OUT_OF_MEMORY), (12, "zero3 failed with exit code 1:\nKeyError")])
def test_no_other_failure_is_taken_for_one_of_memory(tiny, trained, tmp_path, layers, error):
    trained(room=0, error=error)
    with pytest.raises(RuntimeError, match="failed with exit code 1"):
        gpu_size.measure_size(tmp_path, layers, 16)


def test_steps_become_tokens_per_second_and_mfu(monkeypatch, tmp_path):
    seconds = {"comol": {"median": 0.5}, "lora": {"median": 0.25}}
    monkeypatch.setattr(step, "measure_step", lambda *arguments, **settings: {"seconds": seconds})
    ratio = gpu.measure_ratio(SMALL, tmp_path / "ratio", 3, 1e9, 4e8)
    layer = 2 * 64 * 64 + 2 * 64 * 16 + 3 * 64 * 96
    per_token = 4 * (2 * layer + VOCABULARY * 64) + 12 * 2 * 64 * 16
    assert ratio["tokens_per_second"] == {"comol": 128, "lora": 256}
    assert ratio["mfu"] == {"comol": 128 * per_token / 1e9, "lora": 256 * per_token / 1e9}
    assert ratio["of_products"] == {"comol": 128 * per_token / 4e8, "lora": 256 * per_token / 4e8}


def test_without_a_known_peak_there_is_no_mfu():
    assert gpu.utilization(3e12, None, 6e12) == {"mfu": None, "of_products": 0.5}


def test_a_peak_that_is_none_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"^--peak_tflops 0.0: must be positive$"):
        gpu.measure_gpu(gpu.GpuCase(tmp_path, peak_tflops=0.0))


def test_a_part_runs_in_a_process_of_its_own():
    assert gpu.in_fresh_process(os.getpid) != os.getpid()


@pytest.mark.exhaustive  # 40 s: two launches of DeepSpeed
@pytest.mark.distributed
def test_the_whole_suite_on_a_cpu(tiny, tmp_path, extensions, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(extensions))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rates = RatesCase("cpu", 1 << 16, 32, (24,), 16, 24, (20,), (8,), (2,), calls=2)
    monkeypatch.setattr(gpu, "RatesCase", lambda rounds: rates)
    monkeypatch.setattr(gpu, "in_fresh_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(gpu, "free_memory", lambda: 2**40)
    monkeypatch.setattr(gpu_size, "MOST_LAYERS", 3)
    monkeypatch.setitem(step.GEOMETRIES, "70b", SMALL)
    result = gpu.measure_gpu(gpu.GpuCase(tmp_path, tokens=16, ratio_layers=1, rounds=2, peak_tflops=0.5))
    ratio, size = result["ratio"], result["size"]
    assert result["peak_flops"] == 5e11
    assert set(ratio["mfu"]) == set(gpu.RATIO_CONTENDERS) and min(ratio["mfu"].values()) > 0
    assert (ratio["reference"], ratio["case"]["layers"], ratio["case"]["tokens"]) == ("lora", 1, 64)
    assert (size["layers"], size["tokens"], len(size["seconds"])) == (3, 16, 5)
    assert size["peak_bytes"] > size["planned_peak_bytes"] > 0, "an interpreter is no tensor"
    assert size["mfu"] == pytest.approx(size["flops_per_second"] / 5e11)
    assert "3 of 3 layers" in capsys.readouterr().out


@pytest.mark.exhaustive  # 15 s: a launch of DeepSpeed
@pytest.mark.distributed
def test_what_a_rank_without_memory_says_is_understood(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("import torch\nraise torch.OutOfMemoryError('CUDA')\n")
    with pytest.raises(RuntimeError) as failure:
        run_ranks(1, [str(script), *(["--flag", "a long value"] * 40)], "zero3", 120)
    assert gpu_size.is_out_of_memory(failure.value)
