"""The two constant cores against all tokens, and the theorem that the least-squares core is never the worse one."""

import gc
import statistics
import weakref

import pytest
import torch

from comol_ds.adapters.comol_layer import comol_layers
from comol_ds.errors import UserError
from comol_ds.export.core_sums import calibrate
from comol_ds.export.static_core import (
    CORES,
    constant_cores,
    least_squares_cores,
    mean_gate_cores,
    residuals,
    static_lora,
)
from tests.adapters.models import comol_config
from tests.export.static_models import (
    TARGETS,
    adapter_of,
    exact_model,
    literal_residual,
    literal_rows,
    plain_batch,
)
from tests.tiny_models import left_padded, random_batch

ROUTERS = ["core", "input"]
CLOSE = {"rtol": 1e-10, "atol": 1e-12}  # float64 sums in another order
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("router", ROUTERS)
def test_the_sums_are_those_of_all_tokens_but_padding(router):
    model = exact_model(router=router)
    padded_in_front = left_padded(random_batch(3, seed=6))
    batches = [plain_batch(4, seed=5), {name: padded_in_front[name] for name in ("input_ids", "attention_mask")}]
    assert not batches[1]["attention_mask"].all() and batches[1]["attention_mask"][:, -1].all()
    calibration = calibrate(model, iter(batches))
    literal = literal_rows(model, batches)
    assert calibration.modules.keys() == literal.keys() and len(literal) == 10
    assert calibration.tokens == sum(int(batch["attention_mask"].sum()) for batch in batches)
    for name, layer in comol_layers(model).items():
        sums, rows = calibration.modules[name], literal[name]
        assert sums.tokens == len(rows.h) == calibration.tokens
        assert sums.inputs.dtype == sums.products.dtype == sums.mean_core.dtype == torch.float64
        torch.testing.assert_close(sums.inputs, rows.h.t() @ rows.h, **CLOSE)
        torch.testing.assert_close(sums.products, rows.h.t() @ rows.product, **CLOSE)
        assert sums.squares == pytest.approx(float(rows.product.square().sum()), rel=1e-10)
        cores = layer.comol_cores["default"].detach()
        mean_core = sum(p * core for p, core in zip(rows.gates.mean(0), cores, strict=True))
        torch.testing.assert_close(sums.mean_core, mean_core, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("rows, longest", [(1, 6), (4, 24)], ids=["no more tokens than R", "many tokens"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_least_squares_core_is_never_worse_on_its_calibration_tokens(dtype, router, rows, longest, seed):
    model = exact_model(seed=seed, dtype=dtype, router=router)
    batches = [plain_batch(rows, seed=seed, longest=longest)]
    calibration = calibrate(model, batches)
    assert (calibration.tokens <= 6) == (rows == 1)
    best, cheap = least_squares_cores(calibration), mean_gate_cores(calibration)
    found, compared = residuals(calibration, best), residuals(calibration, cheap)
    literal = literal_rows(model, batches)
    for module, by_all_tokens in literal.items():
        assert found[module] <= compared[module], module
        assert literal_residual(by_all_tokens, best[module]) <= literal_residual(by_all_tokens, cheap[module]), module
        if dtype == torch.float64:  # an fp32 layer's own h differs from the literal one
            assert found[module] == pytest.approx(literal_residual(by_all_tokens, best[module]), abs=1e-7)
            assert compared[module] == pytest.approx(literal_residual(by_all_tokens, cheap[module]), abs=1e-7)
    assert statistics.median(compared.values()) > 0.1, "routers that hardly leave their mean prove nothing"


@pytest.mark.parametrize("router", ROUTERS)
def test_with_tokens_enough_it_is_the_least_squares_solution(router):
    model = exact_model(router=router)
    batches = [plain_batch(4, seed=3), plain_batch(4, seed=4)]
    calibration = calibrate(model, batches)
    found = residuals(calibration, least_squares_cores(calibration))
    for module, rows in literal_rows(model, batches).items():
        solution = torch.linalg.lstsq(rows.h, rows.product, driver="gelsd").solution
        assert found[module] == pytest.approx(literal_residual(rows, solution), rel=1e-9)


def test_held_out_tokens_judge_the_cores_of_others():
    model = exact_model()
    calibration, held_out = calibrate(model, [plain_batch(4, seed=3)]), [plain_batch(4, seed=4)]
    rows = literal_rows(model, held_out)
    for compute in CORES.values():
        cores = compute(calibration)
        found = residuals(calibrate(model, held_out), cores)
        assert found == {name: pytest.approx(literal_residual(rows[name], cores[name]), rel=1e-7) for name in rows}


def test_directions_that_no_token_has_keep_the_mean_gate_core():
    model = exact_model()
    batches = [{"input_ids": torch.tensor([[7, 21, 99]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}]
    calibration = calibrate(model, batches)
    best, cheap = least_squares_cores(calibration), mean_gate_cores(calibration)
    for module, rows in literal_rows(model, batches).items():
        unseen = torch.linalg.svd(rows.h)[2][3:]  # [3, R], orthogonal to all three tokens
        torch.testing.assert_close(unseen @ best[module], unseen @ cheap[module], rtol=0, atol=1e-6)
        assert not torch.allclose(best[module], cheap[module], atol=1e-3)


def test_one_expert_is_its_own_constant_core():
    model = exact_model(num_experts=1)
    calibration = calibrate(model, [plain_batch(4, seed=5)])
    for cores in (least_squares_cores(calibration), mean_gate_cores(calibration)):
        assert max(residuals(calibration, cores).values()) < 1e-7
        for name, layer in comol_layers(model).items():
            torch.testing.assert_close(cores[name], layer.comol_cores["default"][0].detach(), rtol=0, atol=1e-9)


def test_a_module_whose_update_is_nothing_has_no_residual():
    model = exact_model()
    with torch.no_grad():
        comol_layers(model)[Q_PROJ].comol_A["default"].zero_()
    calibration = calibrate(model, [plain_batch(2, seed=5)])
    cores = least_squares_cores(calibration)
    assert torch.equal(cores[Q_PROJ], mean_gate_cores(calibration)[Q_PROJ])
    assert residuals(calibration, cores)[Q_PROJ] == 0


def test_padding_may_hold_anything():
    model, batch = exact_model(), plain_batch(4, seed=5)
    other = {**batch, "input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], 77)}
    one, two = (calibrate(model, [which]).modules for which in (batch, other))
    assert all(torch.equal(one[name].products, two[name].products) for name in one)


def test_no_token_outlives_its_pass():
    model, hidden = exact_model(), []
    layer = comol_layers(model)[Q_PROJ]
    layer.core_output.register_forward_hook(lambda module, args, o: hidden.append(weakref.ref(o)))
    calibration = calibrate(model, (plain_batch(2, seed=seed) for seed in range(3)))
    gc.collect()
    assert len(hidden) == 3 and not any(o() is not None for o in hidden)
    numbers = sum(torch.as_tensor(value).numel() for value in vars(calibration.modules[Q_PROJ]).values())
    assert numbers == 3 * 6 * 6 + 2


def test_the_static_lora_multiplies_with_the_constant_core():
    model = exact_model(dtype=torch.float32)
    config, tensors = adapter_of(model)
    cores = least_squares_cores(calibrate(model, [plain_batch(4, seed=5)]))
    lora = static_lora(tensors, config, cores)
    assert lora.rank == 6 and lora.down.keys() == lora.up.keys() == cores.keys()
    for name, layer in comol_layers(model).items():
        x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        down, up = (getattr(layer, part)["default"].detach().double() for part in ("comol_A", "comol_B"))
        expected = 9 / 6 * ((x @ down.t()) @ cores[name]) @ up.t()
        assert lora.down[name].dtype == lora.up[name].dtype == torch.float32
        found = (x @ lora.down[name].double().t()) @ lora.up[name].double().t()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_whole_trained_modules_do_not_fit_into_a_static_lora():
    model = exact_model(modules_to_save=["lm_head"])
    config, tensors = adapter_of(model)
    cores = mean_gate_cores(calibrate(model, [plain_batch(2, seed=5)]))
    with pytest.raises(UserError) as error:
        static_lora(tensors, config, cores)
    assert str(error.value) == (
        "the adapter also holds whole trained modules (modules_to_save), first 'base_model.model.lm_head.weight', which"
        " a static LoRA leaves out; export it with --format comol"
    )


def test_constant_cores_stand_in_while_they_are_asked_to():
    model, batch = exact_model(), plain_batch(2, seed=5)
    cores = mean_gate_cores(calibrate(model, [batch]))
    layer, x = comol_layers(model)[Q_PROJ], torch.randn(5, 32, dtype=torch.float64)
    down, up = (getattr(layer, part)["default"] for part in ("comol_A", "comol_B"))
    with torch.no_grad():
        routed = layer(x)
        with constant_cores(model, cores):
            constant = layer(x)
        assert torch.equal(layer(x), routed)
        expected = layer.base_layer(x) + 9 / 6 * ((x @ down.t()) @ cores[Q_PROJ]) @ up.t()
    torch.testing.assert_close(constant, expected, **CLOSE)
    assert not torch.allclose(constant, routed)


def no_batches(model):
    calibrate(model, [])


def only_padding(model):
    calibrate(model, [{"input_ids": torch.zeros(1, 4, dtype=torch.long), "attention_mask": torch.zeros(1, 4)}])


def too_few(model):
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    calibrate(model, [batch], min_tokens=1000)


def unknown_name(model):
    calibrate(model, [plain_batch(1, seed=5)], adapter_name="second")


def another_one_active(model):
    model.add_adapter("second", comol_config(target_modules=TARGETS))
    model.set_adapter("second")
    calibrate(model, [plain_batch(1, seed=5)])


def switched_off(model):
    with model.disable_adapter():
        calibrate(model, [plain_batch(1, seed=5)])


def not_finite(model):
    with torch.no_grad():
        comol_layers(model)["model.layers.1.mlp.down_proj"].comol_A["default"][0, 0] = float("nan")
    calibrate(model, [plain_batch(1, seed=5)])


def part_of_the_tokens(model):
    layer = comol_layers(model)["model.layers.1.self_attn.o_proj"]
    layer.register_forward_pre_hook(lambda module, args: (args[0][:, :2],))
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    calibrate(model, [batch])


@pytest.mark.parametrize(
    "ask, message",
    [
        (no_batches, "the calibration data has 0 tokens, at least 1 are needed; give more --calibration data"),
        (only_padding, "the calibration data has 0 tokens, at least 1 are needed; give more --calibration data"),
        (too_few, "the calibration data has 3 tokens, at least 1000 are needed; give more --calibration data"),
        (unknown_name, "the model has no CoMoL layer with an adapter named 'second'"),
        (
            another_one_active,
            "the active adapters are second; a static core is computed with 'default' alone, call"
            " model.set_adapter('default')",
        ),
        (switched_off, f"{Q_PROJ} saw no token: the adapter is switched off, or the model does not use it"),
        (not_finite, "model.layers.1.mlp.down_proj has values that are not finite on the calibration tokens"),
        (
            part_of_the_tokens,
            "model.layers.1.self_attn.o_proj sees 2 of a batch's 3 tokens; a static core is computed for modules that"
            " see every token, drop it from target_modules",
        ),
    ],
)
def test_what_cannot_be_calibrated_is_refused_and_no_hook_stays(ask, message):
    model = exact_model()
    with pytest.raises(UserError) as error:
        ask(model)
    assert str(error.value) == message
    for layer in comol_layers(model).values():
        assert not any(len(seam._forward_hooks) for seam in (layer.partial_sums, layer.gates, layer.core_output))


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match="the model is in training mode"):
        calibrate(exact_model().train(), [plain_batch(1, seed=5)])
