"""What a merge refuses, each in one line, and that whatever ends it early leaves nothing behind."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from comol_ds.export import merged_file, staged_folder
from comol_ds.export.dense_merge import merge_into_base
from comol_ds.export.static_lora import StaticLora
from comol_ds.output_folder import EXPORT_MARK, files_in, write_mark
from tests.export.merging.merge_bases import (
    NORM,
    Q_PROJ,
    assert_same_bits,
    merged_in_memory,
    random_update,
    refusal,
    rewrite,
    save_base,
    tensors_of,
)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "merged"


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def nothing_beside(base: Path) -> bool:
    return list(base.parent.iterdir()) == [base]


def test_a_quantized_base_is_refused_by_the_name_of_its_method(base, static, output):
    edit_json(base / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert refusal(base, static, output) == (
        f"{base} is quantized (gptq, quantization_config in its config.json); use the model's float32, bfloat16 or"
        " float16 weights as the base"
    )
    assert nothing_beside(base)


@pytest.mark.parametrize(
    ("dtype", "code"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8"), (torch.uint8, "U8")], ids=str
)
def test_a_quantized_weight_is_refused_by_name(dtype, code, single, static, output):
    name = f"{Q_PROJ}.weight"
    rewrite(single / SINGLE, lambda tensors: tensors | {name: tensors[name].to(dtype)})
    assert refusal(single, static, output) == (
        f"{single / SINGLE}: tensor {name!r} is stored as {code}, a quantized model; use the model's float32, bfloat16"
        " or float16 weights as the base"
    )
    assert nothing_beside(single)


def test_a_quantized_tensor_that_is_not_updated_is_kept(single, static, output):
    rewrite(single / SINGLE, lambda tensors: tensors | {"scales": torch.ones(7, 3, dtype=torch.float8_e4m3fn)})
    weights = tensors_of(single)
    merge_into_base(single, static, output)
    assert_same_bits(tensors_of(output), merged_in_memory(weights, static))


def without(name: str):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def test_a_module_that_the_files_do_not_have_is_named(single, static, output):
    rewrite(single / SINGLE, without(f"{Q_PROJ}.weight"))
    assert refusal(single, static, output) == (
        f"{single} has no tensor '{Q_PROJ}.weight', the nearest is 'model.layers.1.self_attn.q_proj.weight';"
        " give the base that the adapter was trained on"
    )


def test_a_replacement_that_the_files_do_not_have_is_named(base, static, output):
    message = refusal(base, static, output, replacements={"score.weight": torch.ones(2, 32)})
    assert message.startswith(f"{base} has no tensor 'score.weight', the nearest is '")


def test_a_weight_of_another_shape_is_named(base, static, output):
    wide = StaticLora(dict(static.down) | {Q_PROJ: torch.ones(4, 33)}, static.up, 4)
    message = refusal(base, wide, output)
    assert message.endswith(
        f": tensor '{Q_PROJ}.weight' has shape [32, 32], the adapter's '{Q_PROJ}.weight' needs [32, 33];"
        " give the base that the adapter was trained on"
    )
    message = refusal(base, static, output, replacements={NORM: torch.ones(31)})
    assert message.endswith(
        f": tensor {NORM!r} has shape [32], the adapter's {NORM!r} needs [31];"
        " give the base that the adapter was trained on"
    )


def test_two_tensors_that_may_be_meant_are_named(single, static, output):
    def two_wrappers(tensors):
        weight = tensors.pop(f"{Q_PROJ}.weight")
        short = Q_PROJ.removeprefix("model.")
        return tensors | {f"transformer.{short}.weight": weight, f"{short}.weight": weight.clone()}

    rewrite(single / SINGLE, two_wrappers)
    short = Q_PROJ.removeprefix("model.")
    assert refusal(single, static, output) == (
        f"{single} has '{short}.weight' and 'transformer.{short}.weight', either may be the adapter's"
        f" '{Q_PROJ}.weight'; use another --format"
    )


def test_a_tensor_that_is_meant_twice_is_named(base, static, output):
    other = f"{Q_PROJ.removeprefix('model.')}.weight"
    message = refusal(base, static, output, replacements={other: torch.ones(32, 32)})
    assert message.endswith(
        f": tensor '{Q_PROJ}.weight' would be changed by the adapter's '{Q_PROJ}.weight' and by its {other!r};"
        " give the base that the adapter was trained on"
    )


def remove_weights(base: Path) -> str:
    for file in (*base.glob("*.safetensors"), base / INDEX):
        file.unlink()
    (base / "pytorch_model.bin").write_text("x")
    return f"{base} has neither {SINGLE} nor {INDEX}; load the model and write it with transformers' save_pretrained"


def remove_config(base: Path) -> str:
    (base / "config.json").unlink()
    return f"{base} has no config.json; give the folder of a model in transformers' format"


def promise_too_much(base: Path) -> str:
    index = json.loads((base / INDEX).read_text())
    file = index["weight_map"][NORM]
    index["weight_map"]["more"] = file
    (base / INDEX).write_text(json.dumps(index))
    return f"{base / file} has no tensor 'more', {INDEX} says it has; copy or download both again"


def store_twice(base: Path) -> str:
    first, last = sorted(base.glob("*.safetensors"))[:: len(list(base.glob("*.safetensors"))) - 1]
    name = next(iter(load_file(first)))
    rewrite(last, lambda tensors: tensors | {name: load_file(first)[name]})
    return f"{base}: tensor {name!r} is in {first.name} and in {last.name}; copy or download the model again"


def cut_a_file(base: Path) -> str:
    file = max(base.glob("*.safetensors"))
    os.truncate(file, file.stat().st_size - 1)
    return f"{file} cannot be read as safetensors, copy or download it again: tensor 'model."


def remove_a_file(base: Path) -> str:
    file = max(base.glob("*.safetensors"))
    file.unlink()
    return f"{base / INDEX} names {file.name}, which is missing; copy or download it again"


def damage_the_index(base: Path) -> str:
    (base / INDEX).write_text("{")
    return f"{base / INDEX} cannot be read as JSON, copy or download it again: "


def empty_the_index(base: Path) -> str:
    (base / INDEX).write_text('{"weight_map": {}}')
    return f"{base / INDEX} has no weight_map of tensor names to file names; copy or download it again"


DAMAGES = (
    remove_weights, remove_config, promise_too_much, store_twice, cut_a_file, remove_a_file, damage_the_index,
    empty_the_index,
)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_base_is_refused_before_anything_is_written(damage, base, static, output):
    expected = damage(base)
    assert refusal(base, static, output).startswith(expected)
    assert nothing_beside(base)


def test_an_existing_folder_is_replaced_on_demand_only(base, static, output):
    merge_into_base(base, static, output)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    assert refusal(base, static, output) == (
        f"{output} exists; choose another --output_dir or add --overwrite_output_dir"
    )
    failing = random_update(tensors_of(base), 1e-4)
    refusal(base, failing, output, overwrite=True)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before, "a refusal leaves what was there"
    (output / "chat_template.jinja").write_text("of another base")
    write_mark(output, EXPORT_MARK, files_in(output))
    merge_into_base(base, static, output, overwrite=True)
    assert {path.name for path in output.iterdir()} == {path.name for path in base.iterdir()} | {EXPORT_MARK}
    assert sorted(base.parent.iterdir()) == sorted([base, output])


def test_folders_that_are_no_export_are_never_replaced(base, static, output):
    output.mkdir()
    for name in ("thesis.txt", "config.json", EXPORT_MARK):  # the mark as a user might write it
        (output / name).write_text("years of work")
        assert refusal(base, static, output, overwrite=True) == (
            f"{output} has no {EXPORT_MARK}, the mark of an earlier export, and would be deleted with all that is in"
            " it; choose another --output_dir or empty it yourself"
        )
        assert (output / name).read_text() == "years of work"
    for holder in (base, base.parent):
        assert refusal(base, static, holder, overwrite=True) == (
            f"{holder} holds {base}, which is read; choose another --output_dir"
        )
    file = base.parent / "file"
    file.write_text("x")
    assert refusal(base, static, file, overwrite=True) == f"{file} is a file; --output_dir names a folder"


def test_what_came_into_an_export_later_is_never_deleted(base, static, output):
    merge_into_base(base, static, output)
    (output / "src" / ".git").mkdir(parents=True)
    (output / "src" / ".git" / "HEAD").write_text("ref")
    (output / "src" / "link").symlink_to(base)
    assert refusal(base, static, output, overwrite=True) == (
        f"{output / 'src/.git/HEAD'} (2 such) came into the export later and would be deleted with it; move it"
        " elsewhere or choose another --output_dir"
    )
    assert (output / "src" / ".git" / "HEAD").read_text() == "ref"


def test_a_base_made_of_links_into_the_export_is_read(base, static, output):
    merge_into_base(base, static, output)
    linked = base.parent / "linked"
    linked.mkdir()
    for file in output.iterdir():
        (linked / file.name).symlink_to(file)
    assert refusal(linked, static, output, overwrite=True) == (
        f"{output} holds {linked}, which is read; choose another --output_dir"
    )


def test_an_empty_folder_may_be_there(base, static, output):
    output.mkdir()
    merge_into_base(base, static, output)
    assert (output / "config.json").is_file()


def test_too_small_a_disk_is_refused_before_anything_is_written(base, static, output, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(staged_folder.shutil, "disk_usage", lambda path: usage(2**30, 2**30 - 1000, 1000))
    size = sum(path.stat().st_size for path in base.iterdir()) / 2**30
    assert refusal(base, static, output) == (
        f"{output} cannot be written: it takes {size:.2f} GiB and 0.00 are free there;"
        " free some space or choose another --output_dir"
    )
    assert nothing_beside(base)


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_disk_that_fills_up_is_named_and_nothing_is_left(call, base, static, output, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(merged_file.os, call, full)
    message = refusal(base, static, output)
    assert message.startswith(f"{output} cannot be written: it takes 0.00 GiB and ")
    assert message.endswith(" are free there; free some space or choose another --output_dir")
    assert nothing_beside(base)


def test_another_failure_of_the_disk_is_passed_on(base, static, output, monkeypatch):
    def failing(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(merged_file.os, "pwrite", failing)
    assert refusal(base, static, output) == (
        f"{output} cannot be written: [Errno 5] Input/output error; choose another --output_dir"
    )
    assert nothing_beside(base)


def test_a_base_that_fails_or_shrinks_meanwhile_is_named(single, static, output, monkeypatch):
    def failing(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(merged_file.os, "preadv", failing)
    assert refusal(single, static, output) == (
        f"{single / SINGLE} cannot be read: [Errno 5] Input/output error; check the disk"
    )
    monkeypatch.setattr(merged_file.os, "preadv", lambda *arguments: 0)
    assert refusal(single, static, output) == (
        f"{single / SINGLE} became shorter while it was read; do not change the base meanwhile"
    )
    assert nothing_beside(single)


def test_values_that_the_dtype_cannot_hold_are_refused(tmp_path, output):
    base = save_base(tmp_path / "base", torch.float16, shards=False)
    static = random_update(tensors_of(base))
    static.up[Q_PROJ].mul_(1e8)
    message = (
        f"{base / SINGLE}: the new values of {{!r}} are not finite in its float16;"
        " check the adapter and the base, or use a float32 copy of the base"
    )
    assert refusal(base, static, output) == message.format(f"{Q_PROJ}.weight")
    static.up[Q_PROJ].mul_(1e-8)
    assert refusal(base, static, output, replacements={NORM: torch.full((32,), 1e5)}) == message.format(NORM)
    assert nothing_beside(base)


def test_an_interrupted_merge_leaves_nothing(base, static, output, monkeypatch):
    written, pwrite = [], os.pwrite

    def interrupted(*arguments):
        written.append(arguments)
        if len(written) > 12:
            raise KeyboardInterrupt
        return pwrite(*arguments)

    monkeypatch.setattr(merged_file.os, "pwrite", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge_into_base(base, static, output)
    assert nothing_beside(base)


KILLED_IN_THE_MIDDLE = """
    import os, signal, sys, torch
    from comol_ds.export.dense_merge import merge_into_base
    from comol_ds.export.static_lora import StaticLora
    pwrite, written = os.pwrite, []
    def killed(*arguments):
        written.append(arguments)
        if len(written) > 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return pwrite(*arguments)
    os.pwrite = killed
    module = sys.argv[3]
    merge_into_base(sys.argv[1], StaticLora({module: torch.ones(1, 32)}, {module: torch.ones(32, 1)}, 1), sys.argv[2])
"""


def test_a_killed_merge_leaves_no_output_folder_and_the_next_one_cleans_up(base, static, output):
    command = [sys.executable, "-c", textwrap.dedent(KILLED_IN_THE_MIDDLE), str(base), str(output), Q_PROJ]
    assert subprocess.run(command, cwd=REPOSITORY, timeout=120).returncode == -signal.SIGKILL
    hidden = output.with_name(".merged.writing")
    assert sorted(base.parent.iterdir()) == [hidden, base]
    weights = tensors_of(base)
    merge_into_base(base, static, output)
    assert sorted(base.parent.iterdir()) == sorted([base, output])
    assert_same_bits(tensors_of(output), merged_in_memory(weights, static))
