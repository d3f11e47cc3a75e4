"""A static update merged into a base: every bit of it, what stays as it is, and what the report says."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from comol_ds.export import merged_file
from comol_ds.export.dense_merge import merge_into_base
from comol_ds.output_folder import EXPORT_MARK
from tests.export.merging.merge_bases import (
    EMBEDDING,
    HEAD,
    MODULES,
    NORM,
    Q_PROJ,
    assert_same_bits,
    merged_in_memory,
    random_update,
    refusal,
    rewrite,
    save_base,
    shards_in_folders,
    tensors_of,
)
from tests.tiny_models import FAMILIES, VOCABULARY


def header_of(file: Path) -> bytes:
    content = file.read_bytes()
    return content[: 8 + int.from_bytes(content[:8], "little")]


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "exports" / "merged"


def save_weight(folder: Path, weight: torch.Tensor) -> Path:
    """A base with one Linear, odd."""
    FAMILIES["llama"].save_pretrained(folder)
    save_file({"odd.weight": weight}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("block", [1 << 19, 1 << 8], ids=["whole tensors", "blocks of a few rows"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_bit_is_that_of_a_merge_in_memory(dtype, block, tmp_path, output, monkeypatch):
    monkeypatch.setattr(merged_file, "BLOCK_ELEMENTS", block)
    monkeypatch.setattr(merged_file, "MIN_BLOCK_ROWS", 4)
    base = save_base(tmp_path / "base", dtype)
    weights = tensors_of(base)
    static = random_update(weights)
    report = merge_into_base(base, static, output)
    expected = merged_in_memory(weights, static)
    assert_same_bits(tensors_of(output), expected)
    changed = [name for name in weights if not torch.equal(weights[name], expected[name])]
    assert sorted(changed) == sorted(f"{module}.weight" for module in MODULES)
    assert report.modules.keys() == set(MODULES)


@pytest.mark.parametrize("shape", [(1537, 1000), (300, 4096), (70000, 8), (65, 9001), (3, 40), (1, 40)], ids=str)
@pytest.mark.parametrize("rank", [1, 16, 100])
def test_blocks_of_the_real_size_do_not_change_a_bit(shape, rank, tmp_path, output):
    base = save_weight(tmp_path / "base", torch.randn(shape).mul(0.02).bfloat16())
    weights = tensors_of(base)
    static = random_update(weights, modules=["odd"], rank=rank)
    merge_into_base(base, static, output)
    assert_same_bits(tensors_of(output), merged_in_memory(weights, static))


def test_a_float64_base_keeps_its_precision(tmp_path, output):
    base = save_weight(tmp_path / "base", torch.randn(40, 24, dtype=torch.float64))
    weights = tensors_of(base)
    static = random_update(weights, modules=["odd"])
    merge_into_base(base, static, output)
    merged = weights["odd.weight"] + (static.up["odd"] @ static.down["odd"]).double()
    assert torch.equal(tensors_of(output)["odd.weight"], merged)


def test_headers_index_and_other_files_keep_their_bytes(base, static, output):
    merge_into_base(base, static, output)
    assert {path.name for path in output.iterdir()} == {path.name for path in base.iterdir()} | {EXPORT_MARK}
    for path in base.iterdir():
        if path.suffix == ".safetensors":
            assert header_of(output / path.name) == header_of(path)
        else:
            assert (output / path.name).read_bytes() == path.read_bytes()


def test_order_and_metadata_of_a_file_that_another_program_wrote_are_kept(single, static, output):
    file = single / "model.safetensors"
    with safe_open(file, "pt") as content:
        offsets = content.offset_keys()
    names = [*offsets[::-2], *(name for name in offsets if name not in offsets[::-2])]
    weights, header, data = tensors_of(single), {"__metadata__": {"format": "pt", "made by": "hand"}}, b""
    for name in names:
        raw = weights[name].view(torch.uint8).numpy().tobytes()
        place = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": "BF16", "shape": list(weights[name].shape), "data_offsets": place}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    merge_into_base(single, static, output)
    assert header_of(output / file.name) == header_of(file)
    assert_same_bits(tensors_of(output), merged_in_memory(weights, static))


def test_merged_model_computes_what_the_model_with_the_update_does(tmp_path, output):
    base = save_base(tmp_path / "base", torch.float32, "llama_tied")
    static = random_update(tensors_of(base))
    merge_into_base(base, static, output)
    model = AutoModelForCausalLM.from_pretrained(base)
    ids = torch.arange(3, 35).view(2, 16)
    with torch.no_grad():
        before = model(ids).logits
        for module, down in static.down.items():
            model.get_submodule(module).register_forward_hook(
                lambda _, args, result, module=module, down=down: result + args[0] @ down.T @ static.up[module].T
            )
        expected, merged = model(ids).logits, AutoModelForCausalLM.from_pretrained(output)
        assert merged.lm_head.weight is merged.model.embed_tokens.weight
        torch.testing.assert_close(merged(ids).logits, expected)
        assert (before - expected).abs().max() > 1e-2


RENAMINGS = {
    "without model.": lambda name: name.removeprefix("model."),
    "language_model.model.": lambda name: f"language_model.{name}",
    "model.language_model.": lambda name: name.replace("model.", "model.language_model.", 1),
}


@pytest.mark.parametrize("rename", RENAMINGS.values(), ids=RENAMINGS)
def test_prefixes_in_the_files_may_differ_from_those_of_the_model(rename, single, static, output):
    weights = tensors_of(single)
    rewrite(single / "model.safetensors", lambda tensors: {rename(name): value for name, value in tensors.items()})
    merge_into_base(single, static, output)
    expected = {rename(name): value for name, value in merged_in_memory(weights, static).items()}
    assert_same_bits(tensors_of(output), expected)


def test_a_prefixed_namesake_does_not_take_the_place_of_the_exact_name(single, static, output):
    rewrite(
        single / "model.safetensors",
        lambda tensors: tensors | {f"language_model.{Q_PROJ}.weight": torch.ones(32, 32, dtype=torch.bfloat16)},
    )
    weights = tensors_of(single)
    merge_into_base(single, static, output)
    assert_same_bits(tensors_of(output), merged_in_memory(weights, static))


def test_replacements_are_cast_once_and_take_the_place_of_whole_tensors(base, static, output):
    weights = tensors_of(base)
    values = {name: torch.randn(weights[name].shape, dtype=torch.float32) for name in (HEAD, EMBEDDING, NORM)}
    report = merge_into_base(base, static, output, replacements=values)
    expected = merged_in_memory(weights, static) | {name: value.bfloat16() for name, value in values.items()}
    assert_same_bits(tensors_of(output), expected)
    assert report.replaced == sorted(values)
    assert f"replaced: {', '.join(sorted(values))}" in report.lines()


def test_tied_weights_can_be_replaced_together(tmp_path, output):
    base = save_base(tmp_path / "base", family="llama_tied")
    weights = tensors_of(base)
    static, value = random_update(weights), torch.randn(VOCABULARY, 32)
    report = merge_into_base(base, static, output, replacements={HEAD: value, EMBEDDING: value.clone()})
    assert_same_bits(tensors_of(output), merged_in_memory(weights, static) | {EMBEDDING: value.bfloat16()})
    assert report.replaced == [EMBEDDING]


@pytest.mark.parametrize("given", [{EMBEDDING: 1.0}, {HEAD: 1.0}, {EMBEDDING: 1.0, HEAD: 2.0}], ids=str)
def test_one_of_two_tied_weights_is_not_replaced_alone(given, tmp_path, output):
    base = save_base(tmp_path / "base", family="llama_tied")
    values = {name: torch.full((VOCABULARY, 32), value) for name, value in given.items()}
    assert refusal(base, random_update(tensors_of(base)), output, replacements=values) == (
        f"{base} ties {next(iter(given))!r} to another weight (tie_word_embeddings in its config.json), and the adapter"
        " holds only one of them, or two that differ; use another --format"
    )


@pytest.mark.parametrize("stored_twice", [True, False])
def test_a_tied_output_layer_takes_no_update(stored_twice, tmp_path, output):
    base = save_base(tmp_path / "base", family="llama_tied")
    update = random_update(tensors_of(base) | {HEAD: tensors_of(base)[EMBEDDING]}, modules=["lm_head"])
    if stored_twice:
        rewrite(
            next(file for file in base.glob("*.safetensors") if EMBEDDING in load_file(file)),
            lambda tensors: tensors | {HEAD: tensors[EMBEDDING].clone()},
        )
    assert refusal(base, update, output) == (
        f"{base} ties 'lm_head.weight' to another weight (tie_word_embeddings in its config.json), and an update of one"
        " would change both; use another --format, or train without this module"
    )


def test_other_forms_of_the_weights_are_left_out(base, static, output):
    for name in ("pytorch_model.bin", "consolidated.00.pth", "model.gguf", "consolidated.safetensors", "notes.txt"):
        (base / name).write_text("x")
    (base / "pytorch_model.bin.index.json").write_text("{}")
    (base / ".cache").mkdir()
    (base / "original").mkdir()
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "rag.jinja").write_text("template")
    report = merge_into_base(base, static, output)
    assert report.left_out == [
        "consolidated.00.pth", "consolidated.safetensors", "model.gguf", "original", "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ]  # fmt: skip
    here = {path.name for path in base.iterdir()}
    assert {path.name for path in output.iterdir()} == here - set(report.left_out) - {".cache"} | {EXPORT_MARK}
    assert (output / "additional_chat_templates" / "rag.jinja").read_text() == "template"


def test_shards_of_one_name_in_two_folders_stay_apart(base, static, output):
    weights, before = tensors_of(base), shards_in_folders(base)
    report = merge_into_base(base, static, output)
    files = {str(file.relative_to(output)): load_file(file) for file in output.rglob("*.safetensors")}
    assert files.keys() == {"w.safetensors", "sub/w.safetensors"}
    assert_same_bits(files["w.safetensors"] | files["sub/w.safetensors"], merged_in_memory(weights, static))
    assert report.left_out == [] and {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_report_says_what_the_cast_took(dtype, tmp_path, output, monkeypatch):
    monkeypatch.setattr(merged_file, "BLOCK_ELEMENTS", 1 << 8)
    monkeypatch.setattr(merged_file, "MIN_BLOCK_ROWS", 4)
    base = save_base(tmp_path / "base", dtype)
    weights = tensors_of(base)
    static = random_update(weights, ratio=0.05)
    report = merge_into_base(base, static, output)
    for module, loss in report.modules.items():
        weight, delta = weights[f"{module}.weight"].double(), (static.up[module] @ static.down[module]).double()
        lost = tensors_of(output)[f"{module}.weight"].double() - weight - delta
        assert loss.dtype == str(dtype).removeprefix("torch.")
        assert loss.ratio == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-5)
        # of a float32 base, the sum's own rounding is all there is, and float64 sees the other half of its error
        assert loss.lost == pytest.approx(float(lost.norm() / delta.norm()), rel=1e-3, abs=1e-6)
    assert report.warnings == []


@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, 1), (torch.float16, 8)], ids=str)
def test_small_updates_are_warned_of_and_smaller_ones_refused(dtype, scale, tmp_path, output):
    base = save_base(tmp_path / "base", dtype)
    weights, name = tensors_of(base), str(dtype).removeprefix("torch.")
    assert merge_into_base(base, random_update(weights, 0.012 / scale), tmp_path / "fine").warnings == []
    report = merge_into_base(base, random_update(weights, 0.008 / scale), tmp_path / "warned")
    (line,) = report.warnings
    assert line.startswith(
        f"the updates of 14 of 14 modules are below {0.01 / scale:.2g} of their weights: {name} loses up to 2"
    )
    assert f"warning: {line}" in report.lines()
    static = random_update(weights, 0.0025 / scale)
    message = refusal(base, static, output)
    module, _, text = message.partition(": ")
    assert module in MODULES
    assert text.startswith(f"the update is {0.0025 / scale:.1e} of the weight, of which {name} loses 5")
    assert text.endswith(
        "%; export with --format lora, merge into a float32 copy of the base, or accept it with --allow_rounding_loss"
    )
    assert not output.parent.exists() or not any(output.parent.iterdir())
    assert merge_into_base(base, static, output, allow_rounding_loss=True).warnings
    assert_same_bits(tensors_of(output), merged_in_memory(weights, static))


def test_a_float32_base_and_an_update_of_zeros_lose_nothing(tmp_path, base, output):
    full = save_base(tmp_path / "full", torch.float32)
    report = merge_into_base(full, random_update(tensors_of(full), 1e-4), output)
    assert report.warnings == [] and all(loss.lost < 1e-3 for loss in report.modules.values())
    report = merge_into_base(base, random_update(tensors_of(base), 0.0), output, overwrite=True)
    assert report.warnings == [] and all(loss.ratio == loss.lost == 0 for loss in report.modules.values())
    assert_same_bits(tensors_of(output), tensors_of(base))


def test_later_threads_compute_with_as_many_threads_as_before(base, static, output):
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        merge_into_base(base, static, output)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
