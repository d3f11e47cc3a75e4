"""Flags, YAML and defaults to a RunConfig, and back."""

import dataclasses

import pytest
import yaml

from comol_ds.config import GROUPS, RunConfig
from comol_ds.config_parser import parse_run_config
from comol_ds.training.run_folder import RunFolder

NEEDED = ["--ds_config", "ds.json"]


@pytest.fixture
def parsed(tmp_path):
    """Parses flags after a YAML file that holds the given text."""

    def parse(*flags: str, yaml_text: str = "", defaults: dict | None = None) -> RunConfig:
        path = tmp_path / "run.yaml"
        path.write_text(yaml_text)
        return parse_run_config([*NEEDED, "--config", str(path), *flags], defaults)

    return parse


def test_without_flags_everything_has_its_default():
    expected = RunConfig()
    expected.run.ds_config = "ds.json"
    assert parse_run_config(NEEDED) == expected


def test_flags_beat_yaml_and_yaml_beats_defaults(parsed):
    given = {"r": 2, "num_experts": 2, "seed": 2, "target_modules": ["a", "b"], "max_length": 2}
    config = parsed("--r", "4", "--max_length", "4", yaml_text="r: 3\nnum_experts: 3\nmax_length: 3", defaults=given)
    assert (config.adapter.r, config.adapter.num_experts, config.run.seed) == (4, 3, 2)
    assert (config.data.max_length, config.adapter.target_modules) == (4, ["a", "b"])


def test_null_in_yaml_is_none_even_where_the_default_is_not(parsed):
    assert parsed(yaml_text="max_eval_records: null").data.max_eval_records is None
    assert parsed(yaml_text="max_eval_records: null", defaults={"max_eval_records": 300}).data.max_eval_records is None
    config = parsed("--max_eval_records", "7", yaml_text="max_eval_records: null")
    assert config.data.max_eval_records == 7


@pytest.mark.parametrize(("word", "expected"), [("true", True), ("false", False), ("True", True), ("False", False)])
def test_booleans(word, expected, parsed):
    assert parsed("--packing", word).data.packing is expected
    assert parsed("--bf16", word).model.bf16 is expected
    assert parsed(yaml_text=f"packing: {word}\nbf16: {word}").data.packing is expected
    assert parsed("--packing", word, yaml_text="packing: " + str(not expected)).data.packing is expected


def test_a_boolean_flag_alone_is_true_and_bf16_is_open(parsed):
    assert parsed("--packing", "--seed", "3").data.packing is True
    assert parsed().model.bf16 is None


def test_dashes_are_underscores(parsed):
    assert parsed("--learning-rate", "0.5", "--num-experts=3").optimizer.learning_rate == 0.5


def test_yaml_numbers_without_a_dot(parsed):
    # YAML 1.1 reads 1e-4 as text
    assert parsed(yaml_text="learning_rate: 1e-4").optimizer.learning_rate == 1e-4
    assert parsed(yaml_text="max_steps: -1").optimizer.max_steps == -1


def test_lists(parsed):
    assert parsed("--dataset", "a.jsonl", "b.jsonl").data.dataset == ["a.jsonl", "b.jsonl"]
    assert parsed(yaml_text="dataset: a.jsonl\nreport_to: [none]").data.dataset == ["a.jsonl"]
    config = parsed("--dataset", "a", "b", "--dataset_weights", "1", "0.5", yaml_text="dataset: [x, y, z]")
    assert (config.data.dataset, config.data.dataset_weights) == (["a", "b"], [1.0, 0.5])


def test_yaml_values_are_the_words_that_were_written(parsed):
    config = parsed(yaml_text='dataset: ["--seed", "7"]\noutput_dir: 010\nr: 010\nadapter_name_or_path: --packing')
    assert (config.data.dataset, config.run.seed, config.data.packing) == (["--seed", "7"], 42, False)
    assert (config.run.output_dir, config.adapter.r, config.adapter.adapter_name_or_path) == ("010", 10, "--packing")
    config = parsed(yaml_text="packing: on\noutput_dir: 2024-05-01\nmax_grad_norm: .inf\ndataset_split: '5'")
    assert (config.data.packing, config.run.output_dir, config.data.dataset_split) == (True, "2024-05-01", "5")
    assert config.optimizer.max_grad_norm == float("inf")
    assert parsed(yaml_text="target_modules: &names [q_proj, v_proj]\nmodules_to_save: *names").adapter.modules_to_save


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], None),
        (["--resume_from_checkpoint"], "latest"),
        (["--resume_from_checkpoint", "latest"], "latest"),
        (["--resume_from_checkpoint", "out/checkpoints/step_3"], "out/checkpoints/step_3"),
        (["--resume_from_checkpoint", "--seed", "1"], "latest"),
    ],
)
def test_resume(words, expected, parsed):
    assert parsed(*words).run.resume_from_checkpoint == expected


def test_local_rank_of_the_deepspeed_launcher_is_accepted():
    config = parse_run_config(["--local_rank=3", *NEEDED])
    assert "local_rank" not in config.flat() and "config" not in config.flat()


def test_written_configuration_can_be_given_back(tmp_path):
    words = "--r 4 --packing --dataset a b --dataset_weights 1 3 --learning_rate 2e-5 --bf16 false --report_to none"
    words += " --target_modules .*(q|v)_proj --eval_steps 5 --model_name_or_path m --resume_from_checkpoint"
    config = parse_run_config([*NEEDED, *words.split()])
    config.data.max_eval_records = None
    folder = RunFolder(str(tmp_path / "out"))
    folder.prepare(config, {"train_batch_size": 8}, from_step=0)
    again = parse_run_config(["--config", str(folder.path / "config.yaml")])
    assert again.flat() == config.flat()
    assert set(config.flat()) == set(yaml.safe_load((folder.path / "config.yaml").read_text()))


def test_every_setting_is_documented_and_named_once():
    names = [field.name for group in GROUPS for field in dataclasses.fields(group)]
    assert len(names) == len(set(names)) == len(RunConfig().flat()) + 2
    for group in GROUPS:
        for field in dataclasses.fields(group):
            help_text = field.metadata.get("help", "")
            assert len(help_text) >= 10 and help_text.endswith("."), field.name


def test_help_groups_the_flags_and_shows_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        parse_run_config(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    starts = [printed.index(f"\n{group._argument_group_name}:") for group in GROUPS]
    assert starts == sorted(starts) and len(starts) == 7
    for group, start, end in zip(GROUPS, starts, [*starts[1:], len(printed)], strict=True):
        for field in dataclasses.fields(group):
            assert f"--{field.name}" in printed[start:end], field.name
    flat = " ".join(printed.split())
    assert "Peak learning rate. (default: 0.0001)" in flat
    assert "Rank of the shared pair (A, B) and side of every core. (default: 16)" in flat
    assert "Longest sequence, in tokens. (default: 1024)" in flat
