"""A checkpoint's weights by name and by slice, bit for bit, and what damaged or foreign files are answered with."""

import errno
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from comol_ds.errors import UserError
from comol_ds.layout import Shard, shard_of
from comol_ds.parallel import weight_files
from comol_ds.parallel.weight_files import WeightFiles
from tests.tiny_models import save_tiny_model

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


@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_every_tensor_and_every_slice_is_the_files_bit_by_bit(kind, models, expected):
    with WeightFiles(str(models[kind])) as files:
        assert files.names == set(expected)
        for name, tensor in expected.items():
            assert files.shape(name) == tuple(tensor.shape)
            assert torch.equal(files.read(name, None, tensor.dtype), tensor)
            for dim, total in enumerate(tensor.shape):
                shards = [shard_of(total, dim, 3, index) for index in range(3)]  # only 48 divides by 3
                parts = [files.read(name, shard, tensor.dtype) for shard in shards]
                for shard, part in zip(shards, parts, strict=True):
                    assert torch.equal(part, tensor.narrow(dim, shard.start, shard.stop - shard.start))
                assert torch.equal(torch.cat(parts, dim), tensor)


@pytest.mark.parametrize("shard", [None, Shard(0, 3, 9), Shard(1, 3, 9), Shard(1, 5, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_read_is_contiguous_and_owns_its_memory(shard, dtype, whole):
    with WeightFiles(str(whole)) as files:
        first = files.read(DOWN_PROJ, shard, dtype)
        assert first.is_contiguous() and first.device.type == "cpu" and first.dtype is dtype
        assert first.untyped_storage().nbytes() == first.numel() * first.element_size()
        before = first.clone()
        first.zero_()
        assert torch.equal(files.read(DOWN_PROJ, shard, dtype), before)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_are_converted_as_torch_converts_them(stored, dtype, tmp_path):
    tensor = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).to(stored)
    save_file({"w": tensor}, tmp_path / "model.safetensors")
    with WeightFiles(str(tmp_path)) as files:
        assert torch.equal(files.read("w", None, dtype), tensor.to(dtype))
        assert torch.equal(files.read("w", Shard(1, 2, 4), dtype), tensor[:, 2:4].to(dtype))


def test_scalars_and_integers_are_read(tmp_path):
    save_file({"scalar": torch.tensor(3.0), "steps": torch.arange(4)}, tmp_path / "model.safetensors")
    with WeightFiles(str(tmp_path)) as files:
        assert torch.equal(files.read("scalar", None, torch.float32), torch.tensor(3.0))
        assert torch.equal(files.read("steps", Shard(0, 1, 3), torch.int64), torch.tensor([1, 2]))


def test_a_slice_past_the_end_is_a_bug_of_the_caller(models):
    with WeightFiles(str(models["whole"])) as files, pytest.raises(AssertionError):
        files.read(NORM, Shard(0, 16, 33), torch.float32)


def test_the_single_file_comes_before_the_index_as_in_from_pretrained(whole):
    (whole / INDEX).write_text("{}")
    with WeightFiles(str(whole)) as files:
        assert files.path.name == "model.safetensors"
    AutoModelForCausalLM.from_pretrained(whole)


def test_names_are_found_strictly(models):
    with WeightFiles(str(models["whole"])) as files:
        assert NORM in files and "norm.weight" not in files
        assert files.find(NORM) == NORM
        assert message_of(files.find, "norm.weight") == (
            f"{files.path} has no tensor 'norm.weight', the nearest is 'model.norm.weight';"
            " use the weights that belong to the model's config.json"
        )
        for read in (files.shape, lambda name: files.read(name, None, torch.float32)):
            assert message_of(read, "norm.weight") == message_of(files.find, "norm.weight")


def test_files_are_opened_at_the_first_read_and_unmapped_by_close(sharded):
    def mapped() -> set[str]:
        return set(re.findall(rf"{re.escape(str(sharded))}/\S+", Path("/proc/self/maps").read_text()))

    with WeightFiles(str(sharded)) as files:
        assert mapped() == set()
        kept = files.read(Q_PROJ, Shard(0, 0, 16), torch.float32)
        assert mapped() == {str(shard_with(sharded, Q_PROJ))}
    assert mapped() == set()
    assert torch.equal(files.read(Q_PROJ, Shard(0, 0, 16), torch.float32), kept)
    files.close()


def test_a_file_is_opened_once(models, monkeypatch):
    opened = []
    safe_open = weight_files.safe_open
    monkeypatch.setattr(weight_files, "safe_open", lambda file, **how: opened.append(file) or safe_open(file, **how))
    with WeightFiles(str(models["sharded"])) as files:
        for name in files.names:
            files.read(name, None, torch.float32)
        assert sorted(opened) == sorted(models["sharded"].glob("model-*.safetensors"))


def test_check_shape_names_both_shapes(models):
    with WeightFiles(str(models["sharded"])) as files:
        files.check_shape(DOWN_PROJ, (32, 48))
        assert message_of(files.check_shape, DOWN_PROJ, (32, 64)) == (
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

    monkeypatch.setattr(Path, "read_text", fail)
    assert message_of(WeightFiles, str(sharded)) == (
        f"{sharded / INDEX} cannot be read as JSON, copy or download it again: [Errno 5] Input/output error"
    )


def test_an_index_that_names_a_missing_file_is_refused(sharded):
    shard = shard_with(sharded, NORM)
    shard.unlink()
    assert message_of(WeightFiles, str(sharded)) == (
        f"{sharded / INDEX} names {shard.name}, which is missing; copy or download it again"
    )


def test_a_tensor_that_the_index_promises_and_the_file_lacks_is_named(sharded):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.extra.weight"] = index["weight_map"][NORM]
    (sharded / INDEX).write_text(json.dumps(index))
    with WeightFiles(str(sharded)) as files:
        # whichever tensor of the file is read first
        assert message_of(files.shape, NORM) == message_of(files.shape, "model.extra.weight")
        assert message_of(files.shape, NORM) == (
            f"{shard_with(sharded, NORM)} has no tensor 'model.extra.weight', {INDEX} says it has;"
            " copy or download both again"
        )


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 272144\n"


@pytest.mark.parametrize(
    "damage",
    [lambda _: b"", lambda data: data[:30], lambda data: data[:-8], lambda data: b"\xff" * 90, lambda _: LFS_POINTER],
    ids=["empty", "cut header", "cut data", "garbage", "Git LFS pointer"],
)
def test_a_damaged_file_is_named_when_it_is_opened(damage, sharded):
    shard = shard_with(sharded, NORM)
    shard.write_bytes(damage(shard.read_bytes()))
    expected = f"{shard} cannot be read as safetensors, copy or download it again: Error while deserializing header: "
    with WeightFiles(str(sharded)) as files:
        assert message_of(files.read, NORM, None, torch.float32).startswith(expected)
    single = shard.rename(sharded / "model.safetensors")
    assert message_of(WeightFiles, str(sharded)).startswith(expected.replace(str(shard), str(single)))


def test_a_file_that_goes_away_is_named(sharded):
    with WeightFiles(str(sharded)) as files:
        shard = shard_with(sharded, NORM)
        shard.unlink()
        assert message_of(files.read, NORM, None, torch.float32).startswith(
            f"{shard} cannot be read as safetensors, copy or download it again: No such file or directory"
        )


def test_a_disk_error_while_reading_names_the_file(whole, monkeypatch):
    class FailingSlice:
        def __getitem__(self, index):
            raise OSError(errno.EIO, "Input/output error")

    class FailingFile:
        def __init__(self, *_, **__):
            pass

        def keys(self):
            return [NORM]

        def get_slice(self, name):
            return FailingSlice()

    monkeypatch.setattr(weight_files, "safe_open", FailingFile)
    with WeightFiles(str(whole)) as files:
        assert message_of(files.read, NORM, None, torch.float32) == (
            f"{whole / 'model.safetensors'} cannot be read as safetensors, copy or download it again:"
            " [Errno 5] Input/output error"
        )


@pytest.mark.parametrize("codes", [torch.float8_e4m3fn, torch.int8])
def test_quantized_weights_are_refused(codes, tmp_path):
    save_file({"w": torch.ones(4, 4).to(codes)}, tmp_path / "model.safetensors")
    with WeightFiles(str(tmp_path)) as files:
        assert message_of(files.read, "w", Shard(0, 0, 2), torch.bfloat16) == (
            f"{tmp_path / 'model.safetensors'}: tensor 'w' is stored as {codes}, a quantized model;"
            " use the model's float32, bfloat16 or float16 weights"
        )


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
    with WeightFiles(HUB_NAME) as files:
        assert files.path.parent == hub_snapshot
        assert torch.equal(files.read(Q_PROJ, Shard(1, 8, 24), torch.float32), expected[Q_PROJ][:, 8:24])


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
        "--model_name_or_path ../no/such/folder cannot be loaded: "
    )
