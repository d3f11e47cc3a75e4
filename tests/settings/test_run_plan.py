"""Settings to the adapter's configuration, the precision, the parameter counts and the run's identity."""

from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from transformers import AutoModelForCausalLM, Phi3Config

from comol_ds.config import (
    DEFAULT_TARGETS,
    GROUPS,
    AdapterSettings,
    DataSettings,
    ModelSettings,
    OptimizerSettings,
    ParallelSettings,
    RunConfig,
    RunSettings,
)
from comol_ds.errors import UserError
from comol_ds.layout import RankGrid
from comol_ds.parallel.assemble import attach_adapter, comol_config
from comol_ds.parallel.groups import World
from comol_ds.parallel.zero_partition import count_parameters
from comol_ds.training.describe import batches_line
from comol_ds.training.identity import FROM_HERE_ON, LAYOUT, OF_ONE_START, SAME_RUN, Difference, identify
from comol_ds.training.plan import (
    check_schedule,
    decide_bf16,
    load_tokenizer,
    plan_run,
    preview_adapter,
    preview_model,
)
from tests.data.data_helpers import tiny_tokenizer
from tests.tiny_models import FAMILIES, VOCABULARY, save_tiny_model

DS_CONFIG = Path(__file__).resolve().parents[2] / "ds_configs" / "zero3.json"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(model_folder, tmp_path):
    return RunConfig(
        model=ModelSettings(model_name_or_path=str(model_folder), bf16=False),
        adapter=AdapterSettings(r=4, num_experts=3),
        data=DataSettings(dataset=["x.jsonl"]),
        run=RunSettings(ds_config=str(DS_CONFIG), output_dir=str(tmp_path / "out")),
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        (["q_proj"], {"q_proj"}),
        (["self_attn.q_proj"], {"self_attn.q_proj"}),
        (["all-linear"], "all-linear"),
        ([r".*\.layers\.[01]\.mlp\.(up|down)_proj"], r".*\.layers\.[01]\.mlp\.(up|down)_proj"),
    ],
    ids=str,
)
def test_target_modules_reach_the_peft_configuration(given, expected):
    assert comol_config(AdapterSettings(), given).target_modules == expected


@pytest.mark.parametrize(
    ("given", "adapted"),
    [
        (["q_proj"], {"self_attn.q_proj"}),
        (["self_attn.q_proj", "up_proj"], {"self_attn.q_proj", "mlp.up_proj"}),
        ([r".*\.mlp\.(up|down)_proj"], {"mlp.up_proj", "mlp.down_proj"}),
        (
            ["all-linear"],
            {f"self_attn.{name}_proj" for name in "qkvo"} | {f"mlp.{name}_proj" for name in ("gate", "up", "down")},
        ),
    ],
    ids=str,
)
def test_target_modules_are_adapted_in_every_layer(given, adapted):
    base = AutoModelForCausalLM.from_config(FAMILIES["llama"])
    model = attach_adapter(base, AdapterSettings(r=2, target_modules=given), seed=0)
    found = {name.split(".comol_A")[0] for name, _ in model.named_parameters() if ".comol_A" in name}
    assert found == {f"base_model.model.model.layers.{layer}.{name}" for layer in range(2) for name in adapted}


def test_other_adapter_settings_reach_the_peft_configuration():
    settings = AdapterSettings(4, 8, 0.25, 3, "input", "identity", "paper", ["q_proj"], ["lm_head"])
    found = comol_config(settings, settings.target_modules)
    for name in ("r", "lora_alpha", "lora_dropout", "num_experts", "router", "core_init", "dropout_scheme"):
        assert getattr(found, name) == getattr(settings, name), name
    assert found.modules_to_save == ["lm_head"] and found.task_type == "CAUSAL_LM"


def test_preview_counts_what_training_would(config):
    base = AutoModelForCausalLM.from_pretrained(config.model.model_name_or_path)
    adapted = attach_adapter(base, config.adapter, seed=0)
    preview = count_parameters(preview_adapter(preview_model(config.model), config))
    assert preview == count_parameters(adapted) == adapted.get_nb_trainable_parameters()


def test_plan_writes_nothing_and_resolves(config, tmp_path):
    plan = plan_run(config, World(1, 2, 1))
    assert not (tmp_path / "out").exists()
    assert (plan.batches.global_batch, plan.ds_config["train_batch_size"], plan.start_step) == (16, 16, 0)
    assert plan.config.optimizer.global_batch_size == 16
    assert config.optimizer.global_batch_size is None  # the caller's settings stay as they were
    assert (plan.identity.world_size, plan.identity.zero_stage, plan.identity.adapter["r"]) == (2, 3, 4)


@pytest.mark.parametrize("source", ["flag", "json"])
def test_plan_divides_the_world(source, config):
    if source == "flag":
        config = replace(config, parallel=ParallelSettings(tensor_parallel_size=2))
    else:
        config = replace(config, run=replace(config.run, ds_config=str(DS_CONFIG.with_name("zero3_tp2.json"))))
    plan = plan_run(config, World(3, 4, 3))
    assert plan.grid == RankGrid(rank=3, size=4, tensor_parallel=2)
    assert (plan.batches.data_parallel, plan.batches.global_batch) == (2, 16)
    assert plan.config.parallel.tensor_parallel_size == plan.identity.tensor_parallel == 2
    assert plan.ds_config["train_batch_size"] == 16 and "tensor_parallel" not in plan.ds_config
    assert batches_line(plan) == (
        "batches: 8 micro x 1 accumulation x 2 data-parallel = 16 global; 2 tensor-parallel x 2 data-parallel = 4 ranks"
    )


def test_plan_without_tensor_parallelism_says_nothing_of_it(config):
    plan = plan_run(config, World(3, 4, 3))
    assert plan.grid == RankGrid(rank=3, size=4, tensor_parallel=1)
    assert plan.config.parallel.tensor_parallel_size == plan.identity.tensor_parallel == 1
    assert config.parallel.tensor_parallel_size is None
    assert batches_line(plan) == "batches: 8 micro x 1 accumulation x 4 data-parallel = 32 global"


def test_a_group_on_two_nodes_must_be_asked_for(config):
    config = replace(config, parallel=ParallelSettings(tensor_parallel_size=2))
    with pytest.raises(
        UserError, match="--tensor_parallel_size 2 is more than the 1 ranks of a node; use 1, or accept"
    ):
        plan_run(config, World(0, 2, 0, local_size=1))
    config.parallel.allow_cross_node_tp = True
    assert plan_run(config, World(0, 2, 0, local_size=1)).grid.tensor_parallel == 2


def test_consecutive_ranks_on_different_nodes_must_be_asked_for(config):
    """srun --distribution=cyclic over two nodes of two: rank 1 is the first of the second node."""
    config = replace(config, parallel=ParallelSettings(tensor_parallel_size=2))
    with pytest.raises(UserError) as error:
        plan_run(config, World(1, 4, 0, local_size=2))
    assert str(error.value) == (
        "rank 1 is number 0 of its node: consecutive ranks lie on different nodes; start srun with"
        " --distribution=block, or accept the slower links with --allow_cross_node_tp"
    )
    config.parallel.allow_cross_node_tp = True
    assert plan_run(config, World(1, 4, 0, local_size=2)).grid.tp_rank == 1


def test_identity_names_the_first_difference(config, tmp_path):
    identity = plan_run(config, World(0, 2, 0)).identity
    stored = {**vars(identity), "adapter": dict(identity.adapter)}
    assert identity.compare(stored, tmp_path) == Difference()
    other = replace(config, adapter=replace(config.adapter, r=8))
    with pytest.raises(UserError, match=r"was written with adapter.r = 4, this run has 8; resume with the same"):
        plan_run(other, World(0, 2, 0)).identity.compare(stored, tmp_path)


def resolved(config: RunConfig, /, **changes) -> RunConfig:
    """As a plan makes it, with other values of some settings."""
    config = replace(config, model=replace(config.model, bf16=False))
    for group in fields(RunConfig):
        mine = {name: value for name, value in changes.items() if hasattr(getattr(config, group.name), name)}
        config = replace(config, **{group.name: replace(getattr(config, group.name), **mine)})
    return config


SETTINGS = [setting.name for group in GROUPS for setting in fields(group)]


def test_every_setting_is_said_to_belong_to_the_run_or_not():
    """A new one stands in exactly one of the lists of comol_ds/training/identity.py."""
    lists = (SAME_RUN, LAYOUT, FROM_HERE_ON, OF_ONE_START)
    assert {name: sum(name in names for names in lists) for name in SETTINGS} == dict.fromkeys(SETTINGS, 1)
    assert {name for names in lists for name in names} == set(SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_another_value_of_a_setting_is_refused_or_moves_or_counts_from_here_on(name, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "another").write_text('{"up_proj": "colwise"}')  # a plan is known by its content
    ds_config = {"zero_optimization": {"stage": 3}, "train_batch_size": 8}
    config = resolved(config, global_batch_size=8, tensor_parallel_size=1)
    stored = asdict(identify(config, World(0, 2, 0), ds_config))
    identity = identify(resolved(config, **{name: "another"}), World(0, 2, 0), ds_config)
    if name in SAME_RUN:
        with pytest.raises(UserError, match=r"this run has .*(another|random weights)"):
            identity.compare(stored, tmp_path)
        return
    found = identity.compare(stored, tmp_path)
    assert len(found.moved) == (name in LAYOUT)
    assert [change.split()[0] for change in found.changed] == [name] * (name in FROM_HERE_ON)
    assert found.unknown == []


def test_another_plan_of_the_same_name_moves(config, tmp_path):
    plan, ds_config = tmp_path / "plan.json", {"zero_optimization": {"stage": 3}}
    config = resolved(config, tp_plan=str(plan))
    plan.write_text('{"up_proj": "colwise"}')
    stored = asdict(identify(config, World(0, 2, 0), ds_config))
    plan.write_text('{ "up_proj":  "colwise" }')
    assert identify(config, World(0, 2, 0), ds_config).compare(stored, tmp_path) == Difference()
    plan.write_text('{"up_proj": "colwise", "down_proj": "rowwise"}')
    (moved,) = identify(config, World(0, 2, 0), ds_config).compare(stored, tmp_path).moved
    assert moved.startswith("tp_plan plan.json ") and " -> plan.json " in moved


@pytest.mark.parametrize(("asked", "supported", "expected"), [(None, False, False), (False, True, False)])
def test_precision_without_asking_for_bf16(asked, supported, expected, monkeypatch):
    monkeypatch.setattr(get_accelerator(), "is_bf16_supported", lambda: supported)
    assert decide_bf16(asked) is expected


def test_bf16_where_it_is_supported(monkeypatch):
    monkeypatch.setattr(get_accelerator(), "is_bf16_supported", lambda: True)
    assert decide_bf16(True) is True
    monkeypatch.setattr(get_accelerator(), "device_name", lambda index=None: "cuda")
    assert decide_bf16(None) is True


@pytest.mark.parametrize("name", ["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"])
def test_schedules_that_run(name):
    check_schedule(OptimizerSettings(lr_scheduler_type=name, warmup_steps=5))


@pytest.mark.parametrize("name", ["nope", "reduce_lr_on_plateau", "greedy", "warmup_stable_decay"])
def test_schedules_that_do_not(name):
    with pytest.raises(UserError, match=f"--lr_scheduler_type {name}.*try linear or cosine"):
        check_schedule(OptimizerSettings(lr_scheduler_type=name))


def test_checking_a_schedule_draws_no_random_numbers():
    before = torch.get_rng_state()
    check_schedule(OptimizerSettings())
    assert torch.equal(before, torch.get_rng_state())


def test_tokenizer_without_padding_pads_with_the_end(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token == "</s>"


def test_the_default_targets_of_a_fused_model_are_told(config, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    fused = Phi3Config(vocab_size=VOCABULARY, **sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    fused.save_pretrained(tmp_path / "fused")
    tiny_tokenizer().save_pretrained(tmp_path / "fused")
    model = replace(config.model, model_name_or_path=str(tmp_path / "fused"))
    plan = plan_run(replace(config, model=model, adapter=AdapterSettings()), World(0, 1, 0))
    assert plan.notes == [
        "target_modules is not set: o_proj, down_proj are adapted, the model has no q_proj, k_proj, v_proj; its Linear"
        " modules end in: down_proj, gate_up_proj, lm_head, o_proj, qkv_proj"
    ]
    assert plan.config.adapter.target_modules is None  # what the user said
    assert plan.identity.adapter["target_modules"] == list(DEFAULT_TARGETS)  # as in checkpoints of earlier versions
