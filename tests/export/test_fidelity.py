"""How far an export is from the exact model: against a literal count over all predicted tokens, and as it is shown."""

import json
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Mamba2Config

from comol_ds import CoMoLConfig
from comol_ds.adapters.adapter_folder import read_adapter
from comol_ds.adapters.comol_layer import comol_layers
from comol_ds.errors import UserError
from comol_ds.export import logit_scores
from comol_ds.export.core_sums import calibrate
from comol_ds.export.fidelity import Fidelity
from comol_ds.export.logit_scores import (
    Score,
    base_logits,
    constant_core_logits,
    logits_of,
    lora_beside,
    predicted,
    recorded,
    replayed,
    score,
)
from comol_ds.export.lora_folder import write_lora
from comol_ds.export.static_core import CORES, static_lora
from tests.export.static_models import exact_model, plain_batch
from tests.tiny_models import left_padded, random_batch, save_tiny_model
from tests.trained_adapters import save_trained_adapter


@pytest.fixture(scope="module")
def pair():
    """Two models whose logits differ a little, and batches: with labels, without, padded in front."""
    batches = [random_batch(3, seed=5), plain_batch(2, seed=6), left_padded(random_batch(2, seed=7))]
    exact, other = exact_model(), exact_model()
    with torch.no_grad():
        for layer in comol_layers(other).values():
            layer.comol_B["default"].mul_(0.8)
    return exact, other, batches


def literal_score(exact, other, batches):
    """Token by token, the next token's probabilities written out."""
    divergences, agreements, losses = [], [], []
    for batch in batches:
        with torch.no_grad():
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            p, q = (torch.softmax(model(**inputs).logits.double(), -1) for model in (exact, other))
        for row in range(p.shape[0]):
            for t in range(p.shape[1] - 1):
                target = batch.get("labels", batch["input_ids"])[row, t + 1]
                if target == -100 or not batch["attention_mask"][row, t] or not batch["attention_mask"][row, t + 1]:
                    continue
                divergences.append(float((p[row, t] * (p[row, t] / q[row, t]).log()).sum()))
                agreements.append(int(p[row, t].argmax() == q[row, t].argmax()))
                losses.append(-float(q[row, t, target].log()))
    n = len(losses)
    return n, sum(divergences) / n, sum(agreements) / n, math.exp(sum(losses) / n)


@pytest.mark.parametrize("chunk", [logit_scores.CHUNK_ELEMENTS, 5 * 400, 1], ids=["one chunk", "5 rows", "1 row"])
def test_scores_are_those_of_a_literal_count(pair, chunk, monkeypatch):
    exact, other, batches = pair
    monkeypatch.setattr(logit_scores, "CHUNK_ELEMENTS", chunk)
    found = score(logits_of(exact), {"other": logits_of(other)}, iter(batches))
    tokens, kl, agreement, perplexity = literal_score(exact, other, batches)
    assert 0 < agreement < 1, "models that agree everywhere, or nowhere, prove nothing"
    assert found["other"].tokens == found["exact"].tokens == tokens
    assert found["other"].kl == pytest.approx(kl, rel=1e-9) and found["other"].agreement == agreement
    assert found["other"].perplexity == pytest.approx(perplexity, rel=1e-9)
    assert found["exact"].perplexity == pytest.approx(literal_score(exact, exact, batches)[3], rel=1e-9)
    assert (found["exact"].kl, found["exact"].agreement) == (0, 1)


def test_only_labels_are_predicted_where_there_are_any():
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8], [0, 9, 3, 4]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]),
    }
    positions, targets = predicted(batch)
    assert (positions.tolist(), targets.tolist()) == ([0, 1, 5, 6], [6, 7, 3, 4])
    positions, targets = predicted({**batch, "labels": torch.tensor([[5, -100, 7, -100], [-100, 9, -100, 4]])})
    assert (positions.tolist(), targets.tolist()) == ([1, 6], [7, 4])


def test_the_base_is_scored_with_the_adapter_switched_off(pair):
    exact, _, batches = pair
    found = score(logits_of(exact), {"base": base_logits(exact)}, batches)["base"]
    with exact.disable_adapter():
        plain = score(logits_of(exact), {}, batches)["exact"]
    assert found.perplexity == plain.perplexity and found.kl > 0.01


def test_logits_can_be_kept_until_their_model_is_gone(pair, tmp_path):
    exact, other, batches = pair
    at_once = score(recorded(logits_of(exact), tmp_path), {"other": logits_of(other)}, batches)
    assert len(list(tmp_path.iterdir())) == len(batches)
    assert score(replayed(tmp_path), {"other": logits_of(other)}, batches) == at_once
    with pytest.raises(FileNotFoundError):
        replayed(tmp_path)(plain_batch(1, seed=8))


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """A written LoRA folder: (exact model, its folder, cores of both kinds, held-out batches, held-out sums)."""
    folder = tmp_path_factory.mktemp("fidelity")
    base = save_tiny_model(folder / "base")
    model = save_trained_adapter(folder / "adapter", base)
    calibration, held_out = [plain_batch(8, seed=5)], [random_batch(8, seed=6)]
    cores = {name: solve(calibrate(model, calibration)) for name, solve in CORES.items()}
    config, tensors = read_adapter(folder / "adapter")
    write_lora(static_lora(tensors, config, cores["least-squares"]), base, folder / "lora")
    return model, folder / "lora", cores, held_out


def test_the_written_folder_scores_like_its_cores(export):
    model, folder, cores, held_out = export
    lora = lora_beside(model, folder)
    others = {name: constant_core_logits(model, core) for name, core in cores.items()}
    found = score(logits_of(model), {**others, "written": logits_of(lora)}, held_out)
    assert found["written"].kl == pytest.approx(found["least-squares"].kl, rel=1e-4)
    assert found["written"].kl != pytest.approx(found["mean-gate"].kl, rel=1e-2)
    assert found["written"].kl > 1e-4, "a LoRA that differs from the exact model"


def test_a_lora_beside_the_exact_model_shares_its_weights_and_leaves_it_alone(export):
    model, folder, _, held_out = export
    inputs = {name: held_out[0][name] for name in ("input_ids", "attention_mask")}
    names = {name for name, _ in model.named_parameters()}
    with torch.no_grad():
        before = model(**inputs).logits
        lora = lora_beside(model, folder)
        assert torch.equal(model(**inputs).logits, before)
        with lora.disable_adapter(), model.disable_adapter():
            assert torch.equal(lora(**inputs).logits, model(**inputs).logits)
    assert {name for name, _ in model.named_parameters()} == names
    exact = {parameter.data_ptr() for parameter in model.parameters()}
    own = [name for name, parameter in lora.named_parameters() if parameter.data_ptr() not in exact]
    assert own and all(".lora_A." in name or ".lora_B." in name for name in own)


def test_it_is_the_lora_that_peft_loads_onto_a_fresh_base(export):
    model, folder, _, held_out = export
    inputs = {name: held_out[0][name] for name in ("input_ids", "attention_mask")}
    fresh = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder.parent / "base"), folder).eval()
    with torch.no_grad():
        assert torch.equal(lora_beside(model, folder)(**inputs).logits, fresh(**inputs).logits)


def report() -> Fidelity:
    modules = {f"model.layers.{layer}.mlp.up_proj": layer / 20 for layer in range(12)}
    return Fidelity(
        format="merged",
        core="least-squares",
        calibration={"data": "the run's validation split", "tokens": 900, "sha256": "ab"},
        held_out={"data": "the run's validation split", "tokens": 800, "sha256": "cd"},
        scores={
            "exact": Score(400, 0.0, 1.0, 3.25),
            "base": Score(400, 1.5, 0.25, 20.5),
            "least-squares": Score(400, 0.0123, 0.975, 3.5),
            "mean-gate": Score(400, 0.0456, 0.95, 3.75),
            "written": Score(400, 0.0124, 0.9725, 3.5),
        },
        residuals={"least-squares": modules, "mean-gate": {name: 2 * value for name, value in modules.items()}},
    )


def test_the_table_shows_both_cores_and_the_worst_modules():
    assert report().table().splitlines() == [
        "An approximation (--format merged, least-squares core): CoMoL's core differs from token to token, this one is"
        " constant.",
        "On 400 held-out predicted tokens:",
        "                      KL(exact || it)  top-1 agreement   perplexity",
        "exact                               0           100.0%         3.25",
        "base                              1.5            25.0%         20.5",
        "least-squares                  0.0123            97.5%          3.5",
        "mean-gate                      0.0456            95.0%         3.75",
        "written                        0.0124            97.2%          3.5",
        "Residual ||hM - h Mbar|| / ||hM||, the worst 10 of 12 modules:",
        "                               least-squares      mean-gate",
        *(
            f"model.layers.{layer}.mlp.up_proj".ljust(29) + f"{layer / 20:>15.3f}{layer / 10:>15.3f}"
            for layer in range(11, 1, -1)
        ),
    ]


def test_the_json_says_what_the_table_does(tmp_path):
    report().write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["fidelity.json"]
    read = json.loads((tmp_path / "fidelity.json").read_text())
    assert read == report().as_json()
    assert (read["exact"], read["format"], read["core"]) == (False, "merged", "least-squares")
    assert (read["calibration"]["sha256"], read["held_out"]["sha256"]) == ("ab", "cd")
    assert read["scores"]["mean-gate"] == {
        "kl_from_exact_nats": 0.0456,
        "top1_agreement": 0.95,
        "perplexity": 3.75,
        "predicted_tokens": 400,
    }
    assert len(read["residuals"]["least-squares"]) == len(read["residuals"]["mean-gate"]) == 12


def another_vocabulary(exact, logits):
    return {"merged": lambda batch: logits(batch)[:, :-1]}, [plain_batch(1, seed=5)]


def not_finite(exact, logits):
    return {"lora": lambda batch: logits(batch) * float("nan")}, [plain_batch(1, seed=5)]


def nothing_to_predict(exact, logits):
    batch = plain_batch(1, seed=5)
    return {"lora": logits}, [{**batch, "labels": torch.full_like(batch["input_ids"], -100)}]


@pytest.mark.parametrize(
    "case, message",
    [
        (another_vocabulary, "merged has a vocabulary of 399 tokens, the exact model one of 400"),
        (not_finite, "lora gives logits that are not finite on the held-out tokens"),
        (nothing_to_predict, "the held-out data has no token to predict; give more --calibration data"),
    ],
)
def test_what_cannot_be_scored_is_refused(case, message, pair):
    logits = logits_of(pair[0])
    others, batches = case(pair[0], logits)
    with pytest.raises(UserError) as error:
        score(logits, others, batches)
    assert str(error.value) == message


def test_what_peft_takes_no_lora_beside_is_one_line(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "num_hidden_layers": 1}
    base = AutoModelForCausalLM.from_config(Mamba2Config(vocab_size=64, **sizes))
    model = get_peft_model(base, CoMoLConfig(r=2, num_experts=2, target_modules=["out_proj"], task_type="CAUSAL_LM"))
    LoraConfig(r=2, target_modules=["out_proj"], task_type="CAUSAL_LM").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"PEFT refuses a LoRA for this adapter; use --format comol: .*'out_proj'") as e:
        lora_beside(model, tmp_path)
    assert "\n" not in str(e.value)
