"""Files nested, repeated or grown until a reader breaks: every one is a ValueError, for each kind of file we read."""

import pytest

from comol_ds.adapters.adapter_folder import CONFIG_FILE, read_config
from comol_ds.errors import UserError
from comol_ds.export.source import find_adapter
from comol_ds.export.validate import check_folder
from comol_ds.report.command import parse, report
from comol_ds.tensor_files import TensorFiles, read_header
from comol_ds.text_files import parse_json, read_json, read_yaml

DEEP = '{"a":' * 5000


def test_json_that_breaks_a_reader(tmp_path):
    for text in (DEEP, "[" * 100_000, "1" * 5000, '{"a": 1', b"\xff"):
        with pytest.raises(ValueError):
            parse_json(text)
    assert parse_json('{"a": 1, "a": 2}') == {"a": 2}
    with pytest.raises(ValueError, match="'a' is given twice"):
        parse_json('{"b": {"a": 1, "a": 2}}', unique_keys=True)
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(ValueError, match="more than 64 MiB"):
        read_json(tmp_path / "large.json")


LAUGHS = "\n".join(
    ["a0: &a0 {k0: 1}", *(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 30))]
)


@pytest.mark.parametrize(
    "text", ["a: " + "[" * 5000, LAUGHS, "a: 2024-13-45", "a: " + "1" * 5000, "a: !!python/none", "\0"]
)
def test_yaml_that_breaks_a_reader(text, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        read_yaml(path)
    assert "\n" not in str(error.value)


def test_yaml_aliases_do_not_grow(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "\n".join(["a0: &a0 [1]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))])
    )
    values = read_yaml(path)
    assert values["a29"][0] is values["a29"][8] is values["a28"]


def readers(folder):
    """What reads each kind of file -> the file."""
    run = folder / "run"
    return [
        (folder / CONFIG_FILE, lambda: read_config(folder)),
        (folder / CONFIG_FILE, lambda: find_adapter(folder)),
        (folder / CONFIG_FILE, lambda: check_folder(folder, "vllm", None)),
        (folder / "model.safetensors.index.json", lambda: TensorFiles(folder / "model.safetensors.index.json").by_file),
        (run / "router_load.jsonl", lambda: report(parse([str(run)]))),
    ]


@pytest.mark.parametrize("case", range(5))
def test_deep_nesting_is_one_line(case, tmp_path):
    (tmp_path / "run").mkdir()
    path, read = readers(tmp_path)[case]
    path.write_text(f"{DEEP}\n{{}}\n")
    try:
        message = "\n".join(read())
    except UserError as error:
        message = str(error)
    assert path.name in message and "nested too deeply" in message and "\n" not in message


def test_a_deep_header_of_tensors(tmp_path):
    header = DEEP.encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(UserError, match="nested too deeply"):
        read_header(path)
