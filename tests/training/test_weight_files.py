"""A checkpoint's weights to the byte, whole, by slice and by partition, and what damaged files are answered with."""

import errno
import itertools
import json
import os
import resource
import shutil
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.hub import cached_files

from comol_ds.errors import UserError
from comol_ds.layout import Shard, shard_of
from comol_ds.parallel import weight_files, weight_reader
from comol_ds.parallel.weight_files import WeightFiles
from comol_ds.parallel.weight_names import find_weights
from comol_ds.parallel.weight_reader import Read, read_all
from tests.tiny_models import FAMILIES, save_tiny_model

INDEX = "model.safetensors.index.json"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"  # [32, 32]
DOWN_PROJ = "model.layers.0.mlp.down_proj.weight"  # [32, 48]
NORM = "model.norm.weight"  # [32]
HUB_NAME = "somebody/tiny"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """The same weights in one file and in shards."""
    whole = save_tiny_model(tmp_path_factory.mktemp("whole"))
    sharded = tmp_path_factory.mktemp("sharded")
    AutoModelForCausalLM.from_pretrained(whole).save_pretrained(sharded, max_shard_size="60KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    return {"whole": whole, "sharded": sharded}


@pytest.fixture(scope="module")
def expected(models) -> dict[str, torch.Tensor]:
    return load_file(models["whole"] / "model.safetensors")


@pytest.fixture
def whole(models, tmp_path) -> Path:
    return shutil.copytree(models["whole"], tmp_path / "model")


@pytest.fixture
def sharded(models, tmp_path) -> Path:
    return shutil.copytree(models["sharded"], tmp_path / "model")


def shard_with(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def message_of(action, *arguments) -> str:
    """The message of the UserError that the call raises: one line."""
    with pytest.raises(UserError) as raised:
        action(*arguments)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def read(
    files: WeightFiles, name: str, shard: Shard | None, dtype: torch.dtype, start: int = 0, count: int | None = None
) -> torch.Tensor:
    """Part of a tensor of the files, flat if it is not the whole shard."""
    stored = files.by_name[name]
    shape = list(stored.shape)
    if shard is not None:
        shape[shard.dim] = shard.stop - shard.start
    numel = torch.Size(shape).numel()
    target = torch.empty(numel - start if count is None else count, dtype=dtype)
    read_all([Read(stored, shard, start, target)], show_progress=False)
    return target.view(shape) if target.numel() == numel else target


@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_every_tensor_and_every_slice_is_the_files_bit_by_bit(kind, models, expected):
    files = WeightFiles(str(models[kind]))
    assert files.by_name.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(read(files, name, None, tensor.dtype), tensor)
        for dim, total in enumerate(tensor.shape):
            shards = [shard_of(total, dim, 3, index) for index in range(3)]  # only 48 divides by 3
            parts = [read(files, name, shard, tensor.dtype) for shard in shards]
            assert torch.equal(torch.cat(parts, dim), tensor)


@pytest.mark.parametrize("shard", [None, Shard(0, 3, 9), Shard(1, 3, 9), Shard(1, 0, 48), Shard(1, 47, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("partitions", [2, 5, 7])
def test_a_partition_is_a_range_of_the_flattened_slice(shard, dtype, partitions, models, expected):
    files, tensor = WeightFiles(str(models["whole"])), expected[DOWN_PROJ]
    part = tensor if shard is None else tensor.narrow(shard.dim, shard.start, shard.stop - shard.start)
    flat = part.flatten().to(dtype)
    size = -(-flat.numel() // partitions)
    for start in range(0, flat.numel(), size):
        mine = flat[start : start + size]
        assert torch.equal(read(files, DOWN_PROJ, shard, dtype, start, mine.numel()).flatten(), mine)


def test_only_the_bytes_of_the_part_are_asked_for(models, monkeypatch):
    asked = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, to, at: asked.append((at, len(to[0]))) or preadv(file, to, at))
    files = WeightFiles(str(models["whole"]))
    first = files.by_name[DOWN_PROJ].start
    read(files, DOWN_PROJ, None, torch.float32, start=40, count=100)
    read(files, DOWN_PROJ, Shard(0, 8, 16), torch.bfloat16)
    read(files, DOWN_PROJ, Shard(1, 0, 48), torch.float32)
    read(files, DOWN_PROJ, Shard(1, 16, 32), torch.float32, start=10, count=12)  # the end of a row and more of the next
    assert asked == [
        (first + 4 * 40, 4 * 100),
        (first + 4 * 8 * 48, 4 * 8 * 48),
        (first, 4 * 32 * 48),
        (first + 4 * 26, 4 * 6),
        (first + 4 * (48 + 16), 4 * 6),
    ]


def test_long_reads_are_cut_into_pieces_and_short_reads_go_on(models, expected, monkeypatch):
    monkeypatch.setattr(weight_reader, "PIECE_BYTES", 100)  # no multiple of a row
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, to, at: preadv(file, [to[0][:60]], at))
    files = WeightFiles(str(models["sharded"]))
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(read(files, DOWN_PROJ, Shard(1, 3, 40), dtype), expected[DOWN_PROJ][:, 3:40].to(dtype))


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_are_converted_as_torch_converts_them(stored, dtype, tmp_path):
    tensor = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).to(stored)
    save_file({"w": tensor}, tmp_path / "model.safetensors")
    files = WeightFiles(str(tmp_path))
    assert torch.equal(read(files, "w", None, dtype), tensor.to(dtype))
    assert torch.equal(read(files, "w", Shard(1, 2, 4), dtype), tensor[:, 2:4].to(dtype))


def test_scalars_integers_and_empty_tensors_are_read(tmp_path):
    save_file(
        {"scalar": torch.tensor(3.0), "steps": torch.arange(4), "none": torch.empty(0, 3)},
        tmp_path / "model.safetensors",
    )
    files = WeightFiles(str(tmp_path))
    assert torch.equal(read(files, "scalar", None, torch.float32), torch.tensor(3.0))
    assert torch.equal(read(files, "steps", Shard(0, 1, 3), torch.int64), torch.tensor([1, 2]))
    assert read(files, "none", None, torch.float32).shape == (0, 3)


def test_no_file_stays_open_or_mapped(sharded):
    def in_use() -> list[str]:
        handles = [str(handle.resolve()) for handle in Path("/proc/self/fd").iterdir()]
        return [line for line in (*handles, *Path("/proc/self/maps").read_text().splitlines()) if str(sharded) in line]

    files = WeightFiles(str(sharded))
    for name in files.by_name:
        read(files, name, None, torch.bfloat16)
    assert in_use() == []


def test_the_single_file_comes_before_the_index_as_in_from_pretrained(whole):
    (whole / INDEX).write_text("{}")
    assert WeightFiles(str(whole)).path.name == "model.safetensors"
    AutoModelForCausalLM.from_pretrained(whole)


def skeleton(folder: Path) -> torch.nn.Module:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    model.tie_weights()
    return model


def rename(folder: Path, change) -> None:
    """Rewrite the single file with other tensor names."""
    file = folder / "model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(file).items()}, file)


@pytest.mark.parametrize("family", ["llama_tied", "qwen2", "qwen3", "mistral", "gemma3"])
def test_every_parameter_is_found_under_the_models_own_names(family, tmp_path):
    save_tiny_model(tmp_path, family)
    model = skeleton(tmp_path)
    found = find_weights(model, WeightFiles(str(tmp_path)))
    assert found.keys() == dict(model.named_parameters(remove_duplicate=False)).keys()
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if FAMILIES[family].tie_word_embeddings else {}
    assert all(tensor.name == tied.get(name, name) for name, tensor in found.items())


def test_a_missing_prefix_is_added_as_transformers_adds_it(whole, expected):
    rename(whole, lambda name: name.removeprefix("model."))
    found = find_weights(skeleton(whole), WeightFiles(str(whole)))
    loaded = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32).state_dict()
    for name, tensor in expected.items():
        assert found[name].name == name.removeprefix("model.") and torch.equal(loaded[name], tensor)


def test_tied_embeddings_are_found_under_the_heads_name_too(tmp_path):
    save_tiny_model(tmp_path, "llama_tied")
    rename(tmp_path, lambda name: {"model.embed_tokens.weight": "lm_head.weight"}.get(name, name))
    found = find_weights(skeleton(tmp_path), WeightFiles(str(tmp_path)))
    assert found["model.embed_tokens.weight"].name == found["lm_head.weight"].name == "lm_head.weight"


def test_tensors_that_transformers_merges_are_refused(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = AutoConfig.for_model("mixtral", **sizes, num_key_value_heads=2, vocab_size=64, num_local_experts=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    files = WeightFiles(str(tmp_path))
    first = next(name for name in files.by_name if ".experts." in name)
    assert message_of(find_weights, skeleton(tmp_path), files) == (
        f"{files.path}: tensor {first!r} is one that transformers merges or splits for model type 'mixtral', which is"
        " not supported; use a model whose weights are used as stored"
    )


def test_a_tensor_that_is_missing_is_named_with_the_nearest(whole):
    rename(whole, lambda name: "model.nrm.weight" if name == NORM else name)
    files = WeightFiles(str(whole))
    assert message_of(find_weights, skeleton(whole), files) == (
        f"{files.path} has no tensor 'model.norm.weight', the nearest is 'model.nrm.weight';"
        " use the weights that belong to the model's config.json"
    )


def test_another_shape_is_refused_with_both(models):
    files = WeightFiles(str(models["sharded"]))
    assert files.find(DOWN_PROJ, (32, 48), torch.float32) is files.by_name[DOWN_PROJ]
    assert message_of(files.find, DOWN_PROJ, (32, 64), torch.float32) == (
        f"{shard_with(models['sharded'], DOWN_PROJ)}: tensor '{DOWN_PROJ}' has shape [32, 48], the model's"
        " config.json makes it [32, 64]; use the config.json that was saved with the weights"
    )


def test_a_folder_without_safetensors_is_refused(whole):
    (whole / "model.safetensors").rename(whole / "pytorch_model.bin")
    assert message_of(WeightFiles, str(whole)) == (
        f"--model_name_or_path {whole} has neither model.safetensors nor model.safetensors.index.json;"
        " load the model and write it there with transformers' save_pretrained"
    )


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", " cannot be read as JSON, copy or download it again: Expecting value: line 1 column 1 (char 0)"),
        (b'{"weight', " cannot be read as JSON, copy or download it again: Unterminated string starting at: line 1"),
        (b"\xff\xfe", " cannot be read as JSON, copy or download it again: 'utf-8' codec can't decode byte 0xff"),
        (b"[]", " has no weight_map of tensor names to file names; copy or download it again"),
        (b"{}", " has no weight_map of tensor names to file names; copy or download it again"),
        (b'{"weight_map": {}}', " has no weight_map of tensor names to file names; copy or download it again"),
        (b'{"weight_map": ["a"]}', " has no weight_map of tensor names to file names; copy or download it again"),
        (b'{"weight_map": {"a": 1}}', " has no weight_map of tensor names to file names; copy or download it again"),
    ],
)
def test_a_damaged_index_is_refused(content, fault, sharded):
    (sharded / INDEX).write_bytes(content)
    message = message_of(WeightFiles, str(sharded))
    # the decoders' own words go on
    assert message.startswith(f"{sharded / INDEX}{fault}") and ("JSON" in fault or message.endswith(fault))


def test_an_index_that_the_disk_cannot_read_is_refused(sharded, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "open", fail)
    assert message_of(WeightFiles, str(sharded)) == (
        f"{sharded / INDEX} cannot be read as JSON, copy or download it again: [Errno 5] Input/output error"
    )


def test_an_index_that_names_a_missing_file_is_refused(sharded):
    shard = shard_with(sharded, NORM)
    shard.unlink()
    assert message_of(WeightFiles, str(sharded)) == (
        f"{sharded / INDEX} names {shard.name}, which is missing; copy or download it again"
    )


def list_as(folder: Path, name: str) -> None:
    """Let the index list the shard of NORM under another name."""
    index = json.loads((folder / INDEX).read_text())
    shard = index["weight_map"][NORM]
    index["weight_map"] = {tensor: name if file == shard else file for tensor, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))


OUTSIDE = "does not lie in the folder"


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("../shard.safetensors", OUTSIDE),
        ("model-1/../../shard.safetensors", OUTSIDE),
        ("..", OUTSIDE),
        ("", OUTSIDE),
        (".", OUTSIDE),
        ("{tmp}/shard.safetensors", OUTSIDE),
        ("..\\shard.safetensors", "is no file name"),
        ("C:\\shard.safetensors", "is no file name"),
        ("shard\n.safetensors", "is no file name"),
        ("shard\ud800.safetensors", "is no file name"),
        ("x" * 256, "is no file name"),
    ],
)
def test_a_file_outside_the_models_folder_is_refused_before_anything_is_read(name, fault, sharded, monkeypatch):
    """The file is there and whole, so only its place speaks against it."""
    shutil.move(shard_with(sharded, NORM), sharded.parent / "shard.safetensors")
    name = name.replace("{tmp}", str(sharded.parent))
    list_as(sharded, name)
    fetched = []

    def fetch(model: str, names: list[str], **options: bool) -> list[str] | None:
        fetched.append(names)
        return cached_files(model, names, **options)

    monkeypatch.setattr(weight_files, "cached_files", fetch)
    assert message_of(WeightFiles, str(sharded)) == (
        f"{sharded / INDEX} names a file that is not read: {name!r:.200} {fault}; download the model again"
    )
    assert [INDEX] in fetched and all(name not in names for names in fetched)


def test_shards_in_subfolders_and_behind_links_are_read(sharded, expected):
    """A hub's cache holds links to files that lie elsewhere."""
    shard = shard_with(sharded, NORM)
    (sharded / "deep").mkdir()
    (sharded.parent / "blobs").mkdir()
    (sharded / "deep" / "w.safetensors").symlink_to(shutil.move(shard, sharded.parent / "blobs" / "4d7a2146"))
    list_as(sharded, "./deep/w.safetensors")
    files = WeightFiles(str(sharded))
    assert sharded / "deep" / "w.safetensors" in files.files
    assert torch.equal(read(files, NORM, None, torch.float32), expected[NORM])


def test_a_tensor_that_the_index_promises_and_the_file_lacks_is_named(sharded):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.extra.weight"] = index["weight_map"][NORM]
    (sharded / INDEX).write_text(json.dumps(index))
    assert message_of(lambda: WeightFiles(str(sharded)).by_name) == (
        f"{shard_with(sharded, NORM)} has no tensor 'model.extra.weight', {INDEX} says it has;"
        " copy or download both again"
    )


def test_a_tensor_in_two_files_is_named(sharded):
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    name = next(iter(load_file(first)))
    save_file(load_file(second) | {name: load_file(first)[name]}, second)
    assert message_of(lambda: WeightFiles(str(sharded)).by_name) == (
        f"{sharded}: tensor {name!r} is in {first.name} and in {second.name}; copy or download the model again"
    )


REFUSED = "Error while deserializing header"  # by the format's own reader
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 272144\n"


def with_header(header: object, data: bytes = b"\0" * 8) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(**changes: object) -> dict:
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "it has 0 bytes, and a header of 0 is announced"),
        (b"\x10\0\0\0\0\0\0\0{}", "it has 10 bytes, and a header of 16 is announced"),
        (b"\xff" * 90, "it has 90 bytes, and a header of 18446744073709551615 is announced"),
        (LFS_POINTER, f"it has {len(LFS_POINTER)} bytes, and a header of 2336927755350992246 is announced"),
        (with_header([]), "its header is no JSON object"),
        (b"\x02\0\0\0\0\0\0\0{'", "Expecting property name enclosed in double quotes"),
        (b"\x02\0\0\0\0\0\0\0\xff\xff", "'utf-8' codec can't decode"),
        (with_header({"w": {"dtype": "F32"}}), "tensor 'w' has no dtype, shape and data_offsets in the header"),
        (with_header(entry(dtype=["F32"])), "tensor 'w' has no dtype, shape and data_offsets in the header"),
        (with_header(entry(shape=[-2])), "tensor 'w' has no dtype, shape and data_offsets in the header"),
        (with_header(entry(data_offsets=[0, 8.0])), "tensor 'w' has no dtype, shape and data_offsets in the header"),
        (with_header(entry(shape=[2**63])), "tensor 'w' has no dtype, shape and data_offsets in the header"),
        (with_header(entry(shape=[1] * 65)), "tensor 'w' has no dtype, shape and data_offsets in the header"),
        (with_header(entry(shape=[2**62] * 64)), "tensor 'w' of shape"),
        (with_header(entry(data_offsets=[0, 10**30])), "tensor 'w' has no dtype, shape and data_offsets in the header"),
        (with_header(entry(dtype="F" * 10**6)), f"{REFUSED}: invalid JSON in header: unknown variant"),
        (b"\x10\x27\0\0\0\0\0\0" + b"[" * 10000, "it is nested too deeply"),
        (with_header(entry(shape=[3])), "tensor 'w' of shape [3] and dtype F32 has 8 bytes"),
        (with_header(entry(dtype="BF16")), "tensor 'w' of shape [2] and dtype BF16 has 8 bytes"),
        (with_header(entry(), b"\0" * 7), "tensor 'w' lies at bytes 69 to 77 of a file of 76"),
        (with_header(entry(data_offsets=[8, 0])), "tensor 'w' lies at bytes 77 to 69 of a file of 77"),
        (with_header(entry(data_offsets=[4, 12]), b"\0" * 12), f"{REFUSED}: invalid offset for tensor `w`"),
        (with_header(entry(), b"\0" * 9), f"{REFUSED}: incomplete metadata, file not fully covered"),
        (with_header(entry() | {"v": entry()["w"]}), f"{REFUSED}: invalid offset for tensor"),
        (with_header(entry(dtype="F4")), f"{REFUSED}: invalid shape, data type, or offset for tensor"),
        (with_header(entry(dtype="F3")), f"{REFUSED}: invalid JSON in header: unknown variant `F3`"),
    ],
    ids=itertools.count(),
)
def test_a_damaged_file_is_named_before_anything_is_read(content, fault, sharded):
    shard = shard_with(sharded, NORM)
    shard.write_bytes(content)
    expected = f"{shard} cannot be read as safetensors, copy or download it again: {fault}"
    assert message_of(lambda: WeightFiles(str(sharded)).by_name).startswith(expected)
    single = shard.rename(sharded / "model.safetensors")
    assert message_of(lambda: WeightFiles(str(sharded)).by_name).startswith(expected.replace(str(shard), str(single)))


def test_of_a_file_only_the_header_is_read_and_mapped(tmp_path):
    file, size = tmp_path / "model.safetensors", 2 << 30
    file.write_bytes(with_header(entry(dtype="U8", shape=[size], data_offsets=[0, size]), b""))
    os.truncate(file, file.stat().st_size + size)  # of zeros that take no disk

    def bytes_read() -> int:
        fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return int(fields["rchar"])

    read_before, faults_before = bytes_read(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    assert WeightFiles(str(tmp_path)).by_name["w"].shape == (size,)
    assert bytes_read() - read_before < 1 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults_before < 2000  # of 524,288 pages


def test_a_shard_that_is_cut_short_is_named(sharded):
    shard = shard_with(sharded, NORM)
    shard.write_bytes(shard.read_bytes()[:-8])
    found = message_of(lambda: WeightFiles(str(sharded)).by_name)
    assert found.startswith(f"{shard} cannot be read as safetensors, copy or download it again: tensor 'model.")
    assert f"of a file of {shard.stat().st_size}" in found


def test_a_file_that_changes_after_its_header_was_read_is_named(sharded):
    files = WeightFiles(str(sharded))
    stored = files.by_name[NORM]
    os.truncate(stored.file, stored.start + 8)
    remedy = "check the disk, copy or download the file again"
    assert message_of(read, files, NORM, None, torch.bfloat16) == (
        f"{stored.file}: tensor '{NORM}' cannot be read: the file ends at byte {stored.start + 8}, before the tensor"
        f" does; {remedy}"
    )
    stored.file.unlink()
    assert message_of(read, files, NORM, None, torch.float32) == (
        f"{stored.file}: tensor '{NORM}' cannot be read: [Errno 2] No such file or directory: '{stored.file}'; {remedy}"
    )


def test_a_disk_error_names_file_and_tensor_and_stops_the_other_reads(whole, monkeypatch):
    files = WeightFiles(str(whole))
    preadv, bad, asked = os.preadv, files.by_name["model.layers.0.mlp.gate_proj.weight"], []

    def fail_at_one(file, to, at):
        if bad.start in asked:
            time.sleep(0.2)  # these files are tiny: the reads that are left must not be faster than the one that fails
        asked.append(at)
        if at == bad.start:
            raise OSError(errno.EIO, "Input/output error")
        return preadv(file, to, at)

    monkeypatch.setattr(os, "preadv", fail_at_one)
    monkeypatch.setattr(weight_reader, "READERS", 1)
    reads = [Read(tensor, None, 0, torch.empty(tensor.shape).view(-1)) for tensor in files.by_name.values()]
    assert message_of(read_all, reads, False) == (
        f"{whole / 'model.safetensors'}: tensor '{bad.name}' cannot be read: [Errno 5] Input/output error;"
        " check the disk, copy or download the file again"
    )
    assert len(asked) < len(reads)


@pytest.mark.parametrize(("codes", "name"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8")])
def test_quantized_weights_are_refused(codes, name, tmp_path):
    save_file({"w": torch.ones(4, 4).to(codes)}, tmp_path / "model.safetensors")
    files = WeightFiles(str(tmp_path))
    assert message_of(files.find, "w", (4, 4), torch.bfloat16) == (
        f"{tmp_path / 'model.safetensors'}: tensor 'w' is stored as {name}, a quantized model;"
        " use the model's float32, bfloat16 or float16 weights"
    )


def test_a_format_that_torch_does_not_have_is_refused_only_where_it_is_wanted(tmp_path):
    header = entry() | {"codes": {"dtype": "F4", "shape": [4], "data_offsets": [8, 10]}}
    (tmp_path / "model.safetensors").write_bytes(with_header(header, b"\0" * 10))
    files = WeightFiles(str(tmp_path))
    assert torch.equal(read(files, "w", None, torch.float32), torch.zeros(2))
    assert "tensor 'codes' is stored as F4, a quantized model" in message_of(files.find, "codes", (4,), torch.float32)


@pytest.fixture
def hub_snapshot(tmp_path, monkeypatch) -> Path:
    """The folder of HUB_NAME in an empty hub cache, without a connection."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / f"models--{HUB_NAME.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    return repository / "snapshots" / ("0" * 40)


@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_a_hub_name_is_read_from_the_cache(kind, models, hub_snapshot, expected):
    shutil.copytree(models[kind], hub_snapshot, dirs_exist_ok=True)
    files = WeightFiles(HUB_NAME)
    assert files.path.parent == hub_snapshot
    assert torch.equal(read(files, Q_PROJ, Shard(1, 8, 24), torch.float32), expected[Q_PROJ][:, 8:24])


def test_a_hub_model_that_is_cached_in_part_names_what_is_missing(models, hub_snapshot):
    shutil.copytree(models["sharded"], hub_snapshot, dirs_exist_ok=True)
    shard = shard_with(hub_snapshot, NORM)
    shard.unlink()
    assert message_of(WeightFiles, HUB_NAME) == (
        f"{hub_snapshot / INDEX} names {shard.name}, which is missing; copy or download it again"
    )


def test_a_hub_name_without_weights_or_connection_is_refused(hub_snapshot):
    assert message_of(WeightFiles, HUB_NAME) == (
        f"--model_name_or_path {HUB_NAME} has neither model.safetensors nor model.safetensors.index.json;"
        " check the connection to the hub, or give a folder that transformers' save_pretrained wrote"
    )


def test_a_path_that_is_no_folder_and_no_hub_name_is_refused(hub_snapshot):
    assert message_of(WeightFiles, "../no/such/folder").startswith(
        "--model_name_or_path ../no/such/folder cannot be loaded; check the name and the connection to the hub, or give"
    )
