"""--dry_run: what it prints, and that it neither writes nor trains."""

import json
import re
import shutil
from dataclasses import asdict

import pytest
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from comol_ds import CoMoLConfig
from comol_ds.config_parser import parse_run_config
from comol_ds.parallel.groups import World
from comol_ds.training import loop
from comol_ds.training.plan import plan_run
from tests.committed_files import commit_files
from tests.data.data_helpers import sums, write_jsonl
from tests.launch.launcher_calls import launcher, refused, snapshot


@pytest.fixture
def dry_run(inputs, capfd, monkeypatch):
    """Calls the launcher with --dry_run and returns what it prints."""

    def call(*extra, **changes) -> str:
        monkeypatch.setattr(loop.groups, "initialize", None)  # ranks do not even meet
        before = snapshot(inputs.folder)
        capfd.readouterr()
        assert launcher().main(inputs.argv("--dry_run", *extra, **changes)) == 0
        assert snapshot(inputs.folder) == before
        return capfd.readouterr().out

    return call


def section(printed: str, title: str) -> str:
    return re.search(rf"^# {title}[^\n]*\n(.*?)(?=^# |\Z)", printed, re.MULTILINE | re.DOTALL).group(1)


def test_resolved_run_can_be_given_back(dry_run, inputs):
    printed = section(dry_run("--lora_dropout", "0.1"), "run")
    path = inputs.write("again.yaml", printed)
    again = parse_run_config(["--config", str(path)])
    assert (again.adapter.lora_dropout, again.run.dry_run, again.data.dataset) == (0.1, True, [inputs.data])
    assert again.optimizer.global_batch_size == 8  # as it follows from one rank


def test_deepspeed_configuration_is_resolved(dry_run):
    config = json.loads(section(dry_run("--max_grad_norm", "0.3"), "DeepSpeed"))
    assert (config["train_batch_size"], config["train_micro_batch_size_per_gpu"]) == (8, 8)
    assert (config["gradient_clipping"], config["bf16"]["enabled"]) == (0.3, False)
    assert config["zero_optimization"]["stage"] == 1


def test_batch_arithmetic_of_several_ranks(dry_run, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    flags = {"per_device_train_batch_size": 4, "global_batch_size": 24}
    assert "batches: 4 micro x 3 accumulation x 2 data-parallel = 24 global\n" in dry_run(**flags)
    monkeypatch.setenv("RANK", "1")
    assert dry_run(**flags) == ""  # rank 0 says it


def test_batch_arithmetic_of_tensor_parallel_ranks(dry_run, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    printed = dry_run("--tensor_parallel_size", "2")
    ranks = "2 tensor-parallel x 2 data-parallel = 4 ranks"
    assert f"batches: 8 micro x 1 accumulation x 2 data-parallel = 16 global; {ranks}\n" in printed
    assert "tensor_parallel_size: 2\n" in section(printed, "run")
    assert "tensor_parallel" not in json.loads(section(printed, "DeepSpeed"))


@pytest.mark.parametrize(
    "flags",
    [
        {"r": 4, "num_experts": 3},
        {"r": 8, "router": "input", "target_modules": "all-linear"},
        {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_parameter_counts_are_those_of_peft(flags, dry_run, inputs):
    settings = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]} | flags
    base = AutoModelForCausalLM.from_pretrained(inputs.model)
    model = get_peft_model(base, CoMoLConfig(task_type="CAUSAL_LM", **settings))
    trainable, everything = model.get_nb_trainable_parameters()
    share = 100 * trainable / everything
    assert f"trainable params: {trainable:,d} || all params: {everything:,d} || trainable%: {share:.4f}\n" in dry_run(
        **flags
    )


def test_one_example_with_its_label_mask(dry_run):
    shown = section(dry_run(), "first training record").splitlines()
    assert shown[0] == "record records:1, task records: 15 tokens, 6 with loss in [[ ]]"
    assert shown[1] == "<s>How many is 0 and ?[[ There are 0.</s>]]"
    on_all = section(dry_run("--train_on_prompt"), "first training record").splitlines()
    assert on_all[0].endswith("14 with loss in [[ ]]")  # the first token follows nothing
    assert on_all[1] == "<s>[[How many is 0 and ? There are 0.</s>]]"


def test_a_cut_example_says_so(dry_run, inputs):
    data = write_jsonl(inputs.folder / "alike.jsonl", sums(1) * 10)
    printed = dry_run(dataset=data, max_length=13)
    assert "10 records read, 10 cut at max_length 13, " in printed
    head, text = section(printed, "first training record").splitlines()
    assert head.endswith("13 tokens, 4 with loss in [[ ]], cut at the end")
    assert text.startswith("<s>How many is 0 and ?[[ ") and "</s>" not in text


REFUSED = [
    (["--global_batch_size", "64"], "38 training records do not fill one global batch"),
    (["--max_length", "8"], "every prompt is longer than max_length 8"),
    (["--output_dir", "/proc/out"], "--output_dir /proc/out cannot be written: "),
    (["--attn_implementation", "flash_attention_2"], "--attn_implementation flash_attention_2 computes in bfloat16"),
    (["--max_length", "4096", "--packing", "--group_by_length"], "--packing and --group_by_length exclude each other"),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: " ".join(case[0]))
def test_it_refuses_what_the_run_refuses(case, inputs, capfd, monkeypatch):
    words, start = case
    found = refused(inputs, capfd, monkeypatch, inputs.argv(*words))
    assert found.startswith(start) or start in found
    assert refused(inputs, capfd, monkeypatch, inputs.argv("--dry_run", *words)) == found


def test_it_refuses_a_used_run_folder_and_looks_at_a_run_to_be_resumed(inputs, capfd, monkeypatch):
    plan = plan_run(parse_run_config(inputs.argv()), World(0, 1, 0))
    state = json.dumps({"step": 2, "identity": asdict(plan.identity), "router_losses": {}})
    commit_files(plan.folder.checkpoints, 2, {"state.json": state})
    found = refused(inputs, capfd, monkeypatch, inputs.argv("--dry_run"))
    assert found.startswith(f"--output_dir {inputs.out} holds checkpoints of an earlier run; continue it with")
    for words in (["--resume_from_checkpoint"], ["--overwrite_output_dir"]):
        assert launcher().main(inputs.argv("--dry_run", *words)) == 0
    assert (plan.folder.checkpoints / "step_2" / "COMMITTED").exists()


def test_it_refuses_to_continue_with_other_records_under_the_same_name(inputs, capfd, monkeypatch):
    plan = plan_run(parse_run_config(inputs.argv()), World(0, 1, 0))
    identity = asdict(plan.identity) | {"data_content": {f"dataset {plan.config.data.dataset[0]!r}": "7 records, ab"}}
    state = json.dumps({"step": 2, "identity": identity, "router_losses": {}})
    commit_files(plan.folder.checkpoints, 2, {"state.json": state})
    found = refused(inputs, capfd, monkeypatch, inputs.argv("--dry_run", "--resume_from_checkpoint"))
    assert f"data_content.dataset {plan.config.data.dataset[0]!r} = 7 records, ab, this run has " in found
    assert "the content has changed under the same name: restore it or choose another --output_dir" in found


def test_it_refuses_weights_that_do_not_belong_to_the_model(inputs, capfd, monkeypatch):
    model = shutil.copytree(inputs.model, inputs.folder / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 2 * config["intermediate_size"]}))
    found = refused(inputs, capfd, monkeypatch, inputs.argv("--dry_run", model_name_or_path=model))
    assert "the model's config.json makes it" in found
    assert launcher().main(inputs.argv("--dry_run", "--init_random", model_name_or_path=model)) == 0


def test_references_that_no_answer_can_equal_are_counted(dry_run):
    printed = section(dry_run("--max_new_tokens", "2", "--validation_split_percentage", "20"), "sizes")
    assert "exact match: 8 of 8 references are longer than --max_new_tokens 2 and no answer can equal them" in printed
    assert "exact match" not in section(dry_run(), "sizes")


def test_without_validation_everything_is_trained(dry_run):
    printed = section(dry_run("--validation_split_percentage", "0"), "sizes")
    assert "40 for training" in printed and "0 for validation" in printed
