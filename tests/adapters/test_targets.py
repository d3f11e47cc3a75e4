"""What target_modules and its companions reach: every name that a user gives is there, or the call is refused."""

import warnings

import pytest
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Llama4TextConfig,
    Phi3Config,
)

from comol_ds import CoMoLConfig
from comol_ds.adapters import targets
from comol_ds.adapters.comol_layer import comol_layers
from comol_ds.adapters.config import ALL_LINEAR
from comol_ds.adapters.targets import adds_to, settle_targets
from comol_ds.errors import UserError
from tests.adapters.models import comol_config, tiny_llama, tokens

FUSED = Phi3Config(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
ROUTED = Llama4TextConfig(
    vocab_size=64, hidden_size=32, intermediate_size=24, intermediate_size_mlp=24, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=2, pad_token_id=0,
)  # fmt: skip


def adapted(base=None, **changes):
    return get_peft_model(base or tiny_llama(), comol_config(**changes))


def endings(model):
    return {name.rpartition(".")[2] for name in comol_layers(model)}


LINEARS = "Linear modules end in: down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
MODULES = (
    "modules end in: act_fn, down_proj, embed_tokens, gate_proj, input_layernorm, k_proj, layers, lm_head, mlp, model,"
    " norm, o_proj, post_attention_layernorm, q_proj, rotary_emb, self_attn, up_proj, v_proj"
)


def nothing(setting, name, near=None, listed=LINEARS):
    return f"{setting} {name} match no module of the model{f'; near it: {near}' if near else ''}; its {listed}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["q_proj", "kproj"]}, nothing("target_modules", "kproj", "k_proj, v_proj, q_proj")),
        ({"target_modules": ["q_proj", "query_key_value"]}, nothing("target_modules", "query_key_value")),
        ({"target_modules": [ALL_LINEAR, "lm_head"]}, "target_modules all-linear stands alone: name the Linears one by"
                                                      " one, or drop the other names"),
        ({"target_modules": ["mlp.q_proj", "o_proj"]},
         nothing("target_modules", "mlp.q_proj", "mlp.up_proj, mlp.gate_proj, mlp.down_proj")),
        ({"exclude_modules": ["lm_haed"]}, nothing("exclude_modules", "lm_haed", "lm_head", MODULES)),
        ({"modules_to_save": ["lm_haed"]}, nothing("modules_to_save", "lm_haed", "lm_head", MODULES)),
        ({"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*mlp.*"},
         "target_modules up_proj is left with no module (with exclude_modules='.*mlp.*')"),
        ({"layers_to_transform": [0, 2]}, "layers_to_transform 2: the model has no layer of this number with"
                                          " target_modules"),
        ({"target_modules": None, "layers_to_transform": 2}, "layers_to_transform 2: the model has no layer of this"
                                                             " number with target_modules"),
        ({"layers_to_transform": [0], "layers_pattern": "blocks"}, "target_modules down_proj is left with no module"
                                                                   " (with layers_to_transform=[0],"
                                                                   " layers_pattern='blocks')"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(map(str, value)),
)  # fmt: skip
def test_what_stands_for_no_module_is_refused_and_nothing_is_wrapped(changes, message):
    base = tiny_llama()
    before = list(base.state_dict())
    with pytest.raises(UserError) as error:
        adapted(base, **changes)
    assert str(error.value) == message
    assert list(base.state_dict()) == before


def test_a_second_adapter_names_modules_of_the_base():
    model = adapted(target_modules=["q_proj"])
    for name in ("base_layer", "gates"):
        with pytest.raises(UserError, match=f"target_modules {name} match no module"):
            model.add_adapter("second", comol_config(target_modules=["q_proj", name]))


def test_a_module_that_is_trained_whole_needs_no_adapter():
    assert endings(adapted(target_modules=["q_proj", "up_proj"], modules_to_save=["up_proj"])) == {"q_proj"}


def test_the_default_takes_what_is_there_and_says_what_is_not():
    base = AutoModelForCausalLM.from_config(FUSED)
    with pytest.warns(UserWarning) as told:
        model = get_peft_model(base, CoMoLConfig(task_type="CAUSAL_LM"))
    assert endings(model) == model.peft_config["default"].target_modules == {"o_proj", "down_proj"}
    assert [str(warning.message) for warning in told if warning.category is UserWarning] == [
        "target_modules is not set: o_proj, down_proj are adapted, the model has no q_proj, k_proj, v_proj; its Linear"
        " modules end in: down_proj, gate_up_proj, lm_head, o_proj, qkv_proj"
    ]


def test_a_default_that_is_whole_is_quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert len(endings(adapted(target_modules=None))) == 5


def test_saved_adapters_load_whatever_their_names_say(tmp_path):
    """They may come from a time when a name without a module was passed over."""
    model = adapted(target_modules=["q_proj", "up_proj"])
    model.peft_config["default"].target_modules |= {"kproj"}
    model.save_pretrained(tmp_path)
    for is_trainable in (False, True):
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=is_trainable)
        assert endings(loaded) == {"q_proj", "up_proj"}


class Fussy(nn.Linear):
    """As a Linear with packed weights, which runs where its kernel does."""

    def forward(self, x):
        assert x.device.type != "meta"
        return super().forward(x)


def test_a_linear_that_does_not_run_on_meta_is_believed():
    assert adds_to(Fussy(4, 3))


@pytest.mark.parametrize(
    ("task", "build", "head"),
    [
        ("SEQ_CLS", AutoModelForSequenceClassification, "score"),
        ("TOKEN_CLS", AutoModelForTokenClassification, "score"),
        ("QUESTION_ANS", AutoModelForQuestionAnswering, "qa_outputs"),
    ],
)
def test_heads_that_peft_adds_by_task_are_not_judged(task, build, head):
    base = build.from_config(tiny_llama().config)
    model = adapted(base, task_type=task, target_modules=["q_proj"])
    model.add_adapter("second", comol_config(task_type=task, target_modules=["v_proj"]))
    assert head in model.peft_config["second"].modules_to_save
    assert any("v_proj.comol_A.second" in key for key in model.state_dict())
    with pytest.raises(UserError, match="modules_to_save scroe match no module"):
        adapted(build.from_config(base.config), task_type=task, modules_to_save=["scroe"])


def test_whole_names_are_looked_up_and_not_searched(monkeypatch):
    model = tiny_llama(num_hidden_layers=8)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "proj" in name]
    matched = []
    monkeypatch.setattr(targets, "check_target_module_exists", lambda _, module: matched.append(module) or True)
    settle_targets(comol_config(target_modules=names), model)
    assert sorted(matched) == sorted(2 * names)  # of the model, and of its text model


def test_a_linear_that_returns_more_than_a_linear():
    """The router of Llama 4 is a subclass of Linear that returns scores and logits."""
    with pytest.warns(UserWarning, match="all-linear leaves out 2 modules that do not return x W.T: Llama4Router"):
        model = adapted(AutoModelForCausalLM.from_config(ROUTED), target_modules=ALL_LINEAR)
    assert "router" not in endings(model) and "q_proj" in endings(model)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    with pytest.raises(UserError, match=r"match 'model.layers.0.feed_forward.router', a Llama4Router, which does not"):
        adapted(AutoModelForCausalLM.from_config(ROUTED), target_modules=["router"])
