"""What a user got wrong: one line with the value and the remedy, exit code 2, before the model, nothing written."""

import shutil
import sys

import pytest
from deepspeed.accelerator import get_accelerator
from transformers import AutoModelForCausalLM, GPT2Config, OPTConfig

from tests.data.data_helpers import sums, tiny_tokenizer, write_jsonl
from tests.launch.launcher_calls import launcher, snapshot
from tests.tiny_models import FAMILIES

FLAGS = [
    (["--lerning_rate", "1e-3"], "unknown flag --lerning_rate", "nearest known name is --learning_rate"),
    (["--lora-rang=8"], "unknown flag --lora_rang; if lora_rank is meant, it is --r here"),
    (["--gradient_accumulation_steps", "4"], "accumulation follows from --global_batch_size"),
    (["--zzz"], "unknown flag --zzz; see --help"),
    (["--r", "8", "16"], "unexpected argument '16'", "values follow their --flag"),
    (["--r", "eight"], "--r: invalid int value: 'eight'", "see --help"),
    (["--learning_rate", "fast"], "invalid float value: 'fast'", "see --help"),
    (["--packing", "maybe"], "--packing", "maybe"),
    (["--router", "both"], "invalid choice: 'both'", "core"),
    (["--seed"], "--seed", "expected one argument"),
    (["--r", "0"], "--r 0", "must be a positive whole number"),
    (["--r", "-4"], "--r -4", "must be a positive whole number"),
    (["--num_experts", "0"], "--num_experts 0", "must be a positive whole number"),
    (["--num_experts", "1000000000"], "num_experts is 1000000000; it must be a whole number"),
    (["--seed", "-1"], "--seed -1: must not be negative, and less than 2^63"),
    (["--learning_rate", "inf"], "--learning_rate inf: must be a finite number"),
    (["--num_train_epochs", "inf"], "--num_train_epochs inf: must be a finite number"),
    (["--dataset_weights", "nan"], "--dataset_weights [nan]: must be a finite number"),
    (["--collective_timeout_minutes", "1e18"], "_minutes 1e+18: must be positive and at most 525600"),
    (["--preprocessing_num_workers", "1000000"], "--preprocessing_num_workers 1000000: must be at most 1024"),
    (["--lora_dropout", "1"], "--lora_dropout 1.0", "[0, 1)"),
    (["--lora_dropout", "-0.1"], "--lora_dropout -0.1", "[0, 1)"),
    (["--lora_dropout", "nan"], "--lora_dropout nan", "[0, 1)"),
    (["--learning_rate", "-1"], "--learning_rate -1.0", "must not be negative"),
    (["--save_total_limit", "0"], "--save_total_limit 0", "must be a positive whole number"),
    (["--report_to", "comet"], "--report_to ['comet']", "choose from tensorboard, wandb, none"),
    (["--global_batch_size", "20"], "--global_batch_size 20", "--per_device_train_batch_size 8", "use 16 or 24"),
    (["--global_batch_size", "4"], "--global_batch_size 4", "use 8 or 16"),
    (["--dataset_weights", "1", "2"], "--dataset_weights has 2 values for 1 data sets", "one per data set"),
    (["--dataset_weights", "0"], "--dataset_weights [0.0]", "must be positive"),
    (["--streaming", "--max_steps", "-1"], "--streaming needs --max_steps"),
    (["--streaming"], "--streaming needs --eval_dataset", "give --validation_split_percentage 0"),
    (["--validation_split_percentage", "100"], "--validation_split_percentage 100.0: must lie in [0, 100)"),
    (["--validation_split_percentage", "0", "--eval_steps", "5"], "--eval_steps 5 with --validation_split_percentage"),
    (["--validation_split_percentage", "0", "--eval_on_start"], "--eval_on_start True", "give --eval_dataset"),
    (["--validation_split_percentage", "0", "--answer_pattern", "x"], "--answer_pattern x", "or drop it"),
    (["--answer_pattern", "(a"], "--answer_pattern (a: not a regular expression"),
    (["--answer_pattern", "x", "--max_generate_records", "0"], "--max_generate_records 0: no answer is generated"),
    (["--answer_pattern", "#### ([0-9]+)"], "finds nothing in any of the 2 validation answers, such as 'There are"),
    (["--packing", "--group_by_length"], "--packing and --group_by_length exclude each other"),
    (["--lr_scheduler_type", "cosin"], "--lr_scheduler_type cosin", "cosine_with_restarts", "try linear or cosine"),
    (["--lr_scheduler_type", "reduce_lr_on_plateau"], "follows a metric", "try linear or cosine"),
    (["--lr_scheduler_type", "greedy"], "follows a metric", "try linear or cosine"),
    (["--lr_scheduler_type", "cosine_with_min_lr"], "min_lr", "try linear or cosine"),
    (["--target_modules", "q_porj"], "q_porj match no module", "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj"),
    (["--target_modules", "q_proj", "kproj"], "target_modules kproj match no module", "near it: k_proj"),
    (["--target_modules", "all-linear", "lm_head"], "target_modules all-linear stands alone"),
    (["--target_modules", ".*(q|"], "'.*(q|' is not a regular expression"),
    (["--target_modules", "embed_tokens"], "a Embedding", "nn.Linear only"),
    (["--modules_to_save", "lm_haed"], "modules_to_save lm_haed match no module", "near it: lm_head"),
    (["--resume_from_checkpoint", "--overwrite_output_dir"], "--overwrite_output_dir", "give one of them"),
    (["--resume_from_checkpoint", "/no/step_3"], "/no/step_3: no such folder", "give a step_<n> folder or latest"),
    (["--max_length", "1"], "--max_length 1", "must be at least 2"),
    (["--tensor_parallel_size", "0"], "--tensor_parallel_size 0", "must be a positive whole number"),
    (["--consistency_check_steps", "0"], "--consistency_check_steps 0", "must be a positive whole number"),
    (["--tensor_parallel_size", "2"], "--tensor_parallel_size 2 does not divide the world of 1 ranks; use 1, or start"),
    (["--activation_checkpointing", "selective:1"], "selective:1: must be none, full, or selective:N with a whole"),
    (["--partition_activations"], "--partition_activations with --activation_checkpointing none", "set --activation"),
    (["--activation_checkpointing", "full", "--partition_activations", "true"], "there are no tensor-parallel ranks"),
    (["--tp_plan", "no.json"], "--tp_plan no.json: No such file or directory; check the path"),
]  # fmt: skip


@pytest.mark.parametrize("case", FLAGS, ids=lambda case: " ".join(case[0]))
def test_flag(case, message):
    words, *fragments = case
    found = message(*words)
    assert all(fragment in found for fragment in fragments), found


def test_required_flags(message):
    assert message(ds_config=None) == "--ds_config is missing; give a DeepSpeed JSON, for example ds_configs/zero3.json"
    assert "--dataset is missing" in message(dataset=None)


YAML = [
    ("lerning_rate: 0.1", "unknown YAML key lerning_rate", "nearest known name is learning_rate"),
    ("config: other.yaml", "unknown YAML key config; a YAML file cannot name another one; copy its lines"),
    ("lora_rank: 8", "unknown YAML key lora_rank; it is r here"),
    ("8: 1", "unknown YAML key 8; see --help"),
    ("dataset: []", "dataset is an empty list; give it a value or remove the line"),
    ("dataset: [a, [b]]", "line 1: dataset has an item that is a list; give one value"),
    ("dataset: [a, null]", "line 1: dataset has an item that is null; give it a value or remove it"),
    ("r: 8\nseed: 1\nr: 16", "line 3: r is given twice; remove one of the lines"),
    ("? [r]\n: 8", "line 1: a list in place of a flag"),
    ("output_dir: !!python/name:os.system out", "line 1: output_dir has the tag"),
    ("r: " + "[" * 5000, "is nested too deeply; write 'flag: value' lines"),
    ("r: 8\n" + "#" * 2**20, "it has more than 1 MiB"),
    ("r: " + "1" * 5000, "--r: invalid int value: '1111"),
    ("a: &a [x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nr: *c", "line 2: b has an item that is a list"),
    ("r: eight", "--r: invalid int value: 'eight'"),
    ("r: 8.5", "invalid int value: '8.5'"),
    ("r: [8, 16]", "r is a list; give one value"),
    ("dataset: {train: a.jsonl}", "dataset is a dict; give one value"),
    ("r: null", "r is null; give it a value or remove the line"),
    ("- r", "must hold 'flag: value' lines, found a list"),
    ("r: [1\nseed: 2", "not valid YAML", "line 2"),
]


@pytest.mark.parametrize("case", YAML, ids=lambda case: case[0][:40])
def test_yaml(case, message, inputs):
    text, *fragments = case
    found = message("--config", inputs.write("run.yaml", text))
    assert all(fragment in found for fragment in fragments), found


def test_yaml_file_that_cannot_be_read(message, inputs):
    path = inputs.folder / "run.yaml"
    assert message("--config", path) == f"--config {path}: No such file or directory; check the path"
    path.write_bytes(b"output_dir: \xff\xfe")
    assert f"--config {path} is not UTF-8 text (byte 12)" in message("--config", path)


JSON_BLOCKS = [
    ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu = 4", "--per_device_train_batch_size = 8"),
    ({"train_batch_size": 64}, "train_batch_size = 64", "--global_batch_size = 8"),
    ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps = 2", "accumulation of this run = 1"),
    ({"gradient_clipping": 0.5}, "gradient_clipping = 0.5", "--max_grad_norm = 1.0"),
    ({"bf16": {"enabled": True}}, "bf16.enabled = True", "--bf16 = False", 'write "auto"'),
    ({"bf16": True}, "'bf16' must be an object, found True"),
    ({"elasticity": {"enabled": True, "max_train_batch_size": 8}}, "'elasticity' is refused", "remove the block"),
    ({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, "'optimizer' is refused", "--optim, --learning_rate"),
    ({"scheduler": {"type": "WarmupLR"}}, "'scheduler' is refused", "--lr_scheduler_type"),
    ({"fp16": {"enabled": "auto"}}, "'fp16' is refused", "--bf16 true"),
    ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 4", "use 0, 1, 2 or 3"),
    ({"zero_optimization": {"stage": 3, "stage3_max_live": 1}}, "zero_optimization.stage3_max_live = 1", "remove it"),
    ({"zero_optimization": True}, "'zero_optimization' must be an object, found True"),
    ({"tensor_parallel": {"autotp_size": 2}}, "--tensor_parallel_size 2 does not divide the world of 1 ranks"),
    ({"tensor_parallel": {"autotp_size": 1, "dtype": "bf16"}}, "tensor_parallel.dtype is refused", "--tp_plan FILE"),
    ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}, 'reduce_bucket_size is "auto"'),
]  # fmt: skip


@pytest.mark.parametrize("case", JSON_BLOCKS, ids=lambda case: str(case[0]))
def test_deepspeed_json_contradicts_the_run(case, message, inputs):
    blocks, *fragments = case
    found = message(ds_config=inputs.ds_json(**blocks))
    assert all(fragment in found for fragment in fragments), found


@pytest.fixture
def two_ranks(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)


def test_tensor_parallel_flag_contradicts_the_deepspeed_json(message, inputs, two_ranks):
    path = inputs.ds_json(tensor_parallel={"autotp_size": 2})
    assert message("--tensor_parallel_size", "1", ds_config=path) == (
        "DeepSpeed JSON says tensor_parallel.autotp_size = 2, the run says --tensor_parallel_size = 1; write"
        ' "auto" in the JSON or make them agree'
    )


def test_zero_options_that_do_not_go_with_tensor_parallelism(message, inputs, two_ranks):
    path = inputs.ds_json(zero_optimization={"stage": 3, "zero_hpz_partition_size": 2})
    found = message("--tensor_parallel_size", "2", ds_config=path)
    assert found.startswith("DeepSpeed JSON: zero_optimization.zero_hpz_partition_size = 2 is refused with tensor")


def test_weights_kept_as_no_run_can(message, inputs):
    block = {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/tmp"}}
    found = message(ds_config=inputs.ds_json(zero_optimization=block))
    assert found.startswith("DeepSpeed JSON: zero_optimization.offload_param.device = 'nvme' is not supported")
    block = {"stage": 3, "zero_quantized_nontrainable_weights": True}
    found = message(ds_config=inputs.ds_json(zero_optimization=block))
    assert found.startswith("DeepSpeed JSON: zero_optimization.zero_quantized_nontrainable_weights is refused")


def test_tensor_parallel_ranks_on_two_nodes(message, two_ranks, monkeypatch):
    monkeypatch.setenv("LOCAL_SIZE", "1")
    assert message("--tensor_parallel_size", "2") == (
        "--tensor_parallel_size 2 is more than the 1 ranks of a node; use 1, or accept the slower links between nodes"
        " with --allow_cross_node_tp"
    )


def test_model_that_cannot_be_split(message, inputs, two_ranks, monkeypatch):
    assert message("--tensor_parallel_size", "2", "--modules_to_save", "lm_head") == (
        "--modules_to_save lm_head with --tensor_parallel_size 2: modules trained whole are not supported; drop it or"
        " use --tensor_parallel_size 1"
    )
    for name in ("WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.setenv(name, "4")
    found = message("--tensor_parallel_size", "4")
    assert found == "--tensor_parallel_size 4 does not divide num_key_value_heads = 2; use 2"
    AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=1, n_head=4)).save_pretrained(inputs.folder / "gpt2")
    found = message("--tensor_parallel_size", "2", model_name_or_path=inputs.folder / "gpt2")
    assert found.startswith("model type 'gpt2' has no tensor-parallel plan; write one like {")


def test_packing_of_a_model_whose_records_leak(message, inputs):
    OPTConfig(vocab_size=96, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4).save_pretrained(
        inputs.folder / "opt"
    )
    found = message("--packing", model_name_or_path=inputs.folder / "opt")
    assert found.startswith("--packing with model type 'opt': the record before it in a row changes"), found


def test_plan_file_that_would_compute_nonsense(message, inputs, two_ranks):
    path = inputs.write("plan.json", {"mlp.up_proj": "colwise"})
    for words in (["--tensor_parallel_size", "2"], []):  # read, and refused, even where nothing is split
        found = message("--tp_plan", path, *words)
        assert found == (
            f"--tp_plan {path} shards model.layers.0.mlp.up_proj by column and nothing in 'model.layers.0.mlp' by row;"
            " place the row half too"
        )


def test_plan_file_that_the_models_code_does_not_follow(message, inputs, two_ranks):
    OPTConfig(
        vocab_size=96, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4, attention_dropout=0.0
    ).save_pretrained(inputs.folder / "opt")
    attention = {f"self_attn.{name}_proj": "colwise" for name in "qkv"} | {"self_attn.out_proj": "rowwise"}
    path = inputs.write("plan.json", attention | {"fc1": "colwise", "fc2": "rowwise"})
    found = message("--tp_plan", path, "--tensor_parallel_size", "2", model_name_or_path=inputs.folder / "opt")
    assert found.startswith(f"--tp_plan {path} does not serve 2 ranks: model.decoder.layers.0.self_attn fails on"), (
        found
    )


def test_deepspeed_json_that_cannot_be_read(message, inputs):
    path = inputs.folder / "ds.json"
    assert f"--ds_config {path}: No such file or directory; ds_configs/ has working examples" in message(ds_config=path)
    inputs.write("ds.json", '{\n  "train_batch_size": 8,\n  "bf16": {"enabled" true}\n}')
    assert f"--ds_config {path} is not valid JSON: line 3: Expecting ':' delimiter" in message(ds_config=path)
    inputs.write("ds.json", [1])
    assert "must hold a JSON object, found a list" in message(ds_config=path)
    for text, reason in (
        ('{"a": ' * 5000, "it is nested too deeply"),
        ('{"bf16": 1, "bf16": 2}', "'bf16' is given twice"),
    ):
        inputs.write("ds.json", text)
        for flag in ("ds_config", "tp_plan"):
            assert message(**{flag: path}) == f"--{flag} {path} is not valid JSON: {reason}; repair the file"
    path.write_bytes(b'{"a": "\xff"}')
    assert "is not UTF-8 text (byte 7)" in message(ds_config=path)


def test_bf16_on_a_device_without_it(message, monkeypatch):
    monkeypatch.setattr(get_accelerator(), "is_bf16_supported", lambda: False)
    assert message("--bf16", "true") == "--bf16 true: this device does not compute in bfloat16; use --bf16 false"


def test_wandb_that_is_not_installed(message, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    found = message(report_to=["tensorboard", "wandb"])
    assert found == "--report_to tensorboard wandb: wandb is not installed; pip install 'comol_ds[wandb]'"


def test_model_folder(message, inputs):
    path = inputs.folder / "model"
    assert message(model_name_or_path=path) == f"--model_name_or_path {path}: no such folder; check the path"
    path.mkdir()
    assert f"--model_name_or_path {path} cannot be read" in message(model_name_or_path=path)
    inputs.write("model/config.json", {"model_type": "lama"})
    assert f"--model_name_or_path {path} cannot be read" in message(model_name_or_path=path)


def test_model_without_tokenizer(message, inputs):
    path = inputs.folder / "model"
    AutoModelForCausalLM.from_config(FAMILIES["llama"]).save_pretrained(path)
    found = message(model_name_or_path=path)
    assert f"the tokenizer of {path} cannot be read; copy its files (tokenizer.json" in found


def test_tokenizer_without_end_of_sequence(message, inputs):
    path = inputs.folder / "model"
    shutil.copytree(inputs.model, path)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(path)
    assert f"the tokenizer of {path} has no eos_token; set one" in message(model_name_or_path=path)


def test_data_file(message, inputs):
    path = inputs.folder / "data.jsonl"
    assert message(dataset=path) == f"data set '{path}': no such file or folder; check the path"
    path.touch()
    assert f"data file '{path}' is empty" in message(dataset=path)
    path.write_text('{"prompt": "a", "completion": "b"}\n' * 6 + '{"prompt": "a", completion: "b"}\n')
    assert f"{path} line 7: broken JSON" in message(dataset=path)
    write_jsonl(path, [{"body": "a", "label": 1}])
    found = message(dataset=path)
    assert "no known columns (found: body, label); accepted formats: messages (messages), sharegpt" in found
    assert "question_answer (question, answer), text (text); rename the columns" in found
    assert "data set '" in message(eval_dataset=inputs.folder / "held_out.jsonl")


def test_prompts_that_fill_max_length(message, inputs):
    found = message(max_length=8)
    assert "every prompt is longer than max_length 8" in found and "raise --max_length" in found
    rows = [*sums(18), *[{"prompt": "one two " * 60, "completion": "x"}] * 2]
    found = message(dataset=write_jsonl(inputs.folder / "long.jsonl", rows))
    assert "2 of 20 records have no label, more than max_dropped_fraction 0.05; for example long:19" in found
    assert "one two one two" in found and "raise --max_dropped_fraction" in found


def test_fewer_records_than_one_global_batch(message):
    found = message("--global_batch_size", "64")
    assert "38 training records do not fill one global batch (8 micro x 8 accumulation x 1 data-parallel" in found
    assert "lower --global_batch_size" in found


def test_bad_launcher_environment(message, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert message() == "RANK is set but LOCAL_RANK is not; start with deepspeed, torchrun or srun"


def test_only_rank_0_of_a_node_tells(inputs, capfd, monkeypatch):
    waited = []
    monkeypatch.setattr(launcher().time, "sleep", waited.append)
    for rank, local_rank in ((1, 1), (2, 0)):
        for name, value in {"RANK": rank, "WORLD_SIZE": 4, "LOCAL_RANK": local_rank}.items():
            monkeypatch.setenv(name, str(value))
        before = snapshot(inputs.folder)
        assert launcher().main(inputs.argv("--r", "0")) == 2
        assert snapshot(inputs.folder) == before
    assert capfd.readouterr().err == "train.py: error: rank 2: --r 0: must be a positive whole number\n"
    assert waited == [10, 10]
