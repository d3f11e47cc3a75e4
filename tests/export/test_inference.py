"""A trained adapter in plain transformers: loading, answers, router statistics."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from comol_ds import load_for_inference
from comol_ds.adapters.kept_tokenizer import tokenizer_files
from comol_ds.errors import UserError
from comol_ds.serving.command import export, parse
from comol_ds.serving.inference import generate, load_base
from tests.data.data_helpers import sums, tiny_tokenizer, write_jsonl
from tests.router_recount import Recount
from tests.tiny_models import save_tiny_model
from tests.trained_adapters import save_run, save_trained_adapter

PROMPTS = ["1 plus 1 is", "a much longer prompt than the others, 22 plus 4 is", "7"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inference") / "run"
    return folder, save_run(folder)


def test_the_loaded_model_is_the_trained_one_bit_by_bit(run):
    folder, trained = run
    model, _ = load_for_inference(folder)
    ids = torch.arange(3, 40).view(1, -1)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, trained(input_ids=ids).logits)
    assert not model.training


def test_a_base_whose_index_lists_a_file_elsewhere_is_not_read(tmp_path):
    """transformers would read it: the file is there and whole."""
    base = save_tiny_model(tmp_path / "base")
    (base / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    names = load_file(tmp_path / "elsewhere.safetensors")
    index = base / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "../elsewhere.safetensors")}))
    with pytest.raises(UserError) as error:
        load_base(str(base))
    assert str(error.value) == (
        f"{index} names a file that is not read: '../elsewhere.safetensors' does not lie in the folder;"
        " download the model again"
    )


def test_a_batch_is_answered_as_its_prompts_one_by_one(run):
    model, tokenizer = load_for_inference(run[0])
    answers, load = generate(model, tokenizer, PROMPTS, max_new_tokens=5)
    assert answers == [generate(model, tokenizer, [prompt], max_new_tokens=5)[0][0] for prompt in PROMPTS]
    assert load["tokens"].keys() == {"all"}


def test_statistics_count_prompts_and_answers_to_their_end_and_no_padding(run):
    model, tokenizer = load_for_inference(run[0])
    lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    new = model.generate(**tokenizer(PROMPTS[:1], return_tensors="pt"), max_new_tokens=4, do_sample=False)
    answer = new[0, lengths[0] :].tolist()
    model.generation_config.eos_token_id = answer[1]
    end = answer.index(answer[1]) + 1
    texts, load = generate(model, tokenizer, PROMPTS, tasks=["sum", "sum", "other"], max_new_tokens=4)
    alone = [generate(model, tokenizer, [prompt], max_new_tokens=4)[1]["tokens"]["all"] for prompt in PROMPTS]
    assert alone[0] == lengths[0] + end and all(lengths[i] < alone[i] <= lengths[i] + 4 for i in range(3))
    assert load["tokens"] == {"all": sum(alone), "sum": alone[0] + alone[1], "other": alone[2]}
    assert len(load["layers"]) == 10 and len(texts) == 3


def test_mean_gates_equal_a_recount(run):
    model, tokenizer = load_for_inference(run[0], dtype=torch.float64)
    model.double()
    _, load = generate(model, tokenizer, PROMPTS[:1], max_new_tokens=3)
    ids = model.generate(**tokenizer(PROMPTS[:1], return_tensors="pt"), max_new_tokens=3, do_sample=False)
    batch = {"input_ids": ids, "record_index": torch.zeros_like(ids), "tasks": ["all"]}
    recount = Recount(model)
    model(input_ids=ids)
    expected = recount.statistics([batch], [torch.ones_like(ids, dtype=torch.bool)])
    for layer, values in load["layers"].items():
        assert values["mean_gate"] == pytest.approx(expected["layers"][layer]["mean_gate"], rel=1e-9)


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{{ '[assistant]' if add_generation_prompt }}"
)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """An adapter that has kept its run's tokenizer, with another template than the base's."""
    folder = tmp_path_factory.mktemp("kept")
    base = save_tiny_model(folder / "model")
    save_trained_adapter(folder / "adapter", base, tokenizer=tokenizer_files(tiny_tokenizer(), TEMPLATE))
    return folder / "adapter"


def test_chat_asks_with_the_template_of_the_training(kept):
    model, tokenizer = load_for_inference(kept)
    written = ["<s>[user]1 plus 1 is[assistant]", "<s>[system]Be short.[user]7[assistant]"]
    turns = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "7"}]
    answers, load = generate(model, tokenizer, ["1 plus 1 is", turns], max_new_tokens=5, chat=True)
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in written]
    for text, answer, length in zip(written, answers, lengths, strict=True):
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        alone = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
        assert tokenizer.decode(alone[0, length:], skip_special_tokens=True) == answer
    assert sum(lengths) < load["tokens"]["all"] <= sum(lengths) + 10


def test_chat_ends_where_the_template_ends_a_turn(kept):
    model, tokenizer = load_for_inference(kept)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "7"}], add_generation_prompt=True, return_tensors="pt"
    )
    ids = model.generate(**asked, max_new_tokens=5, do_sample=False)[0, asked["input_ids"].shape[1] :].tolist()
    end = next(i for i in ids[1:] if i != ids[0])
    (whole,), _ = generate(model, tokenizer, ["7"], max_new_tokens=5, chat=True)
    written = tokenizer.convert_ids_to_tokens(end)
    tokenizer.add_special_tokens({"additional_special_tokens": [written]})
    turn_end = "{{ '" + written + "' if m.role == 'assistant' }}"
    tokenizer.chat_template = TEMPLATE.replace("{{ m.content }}", "{{ m.content }}" + turn_end)
    (cut,), load = generate(model, tokenizer, ["7"], max_new_tokens=5, chat=True)
    assert cut == tokenizer.decode(ids[: ids.index(end)]) and whole.startswith(cut) and len(cut) < len(whole)
    assert load["tokens"]["all"] == asked["input_ids"].shape[1] + ids.index(end) + 1


def test_chat_without_a_template_or_with_turns_that_it_refuses(kept, tmp_path):
    model, tokenizer = load_for_inference(kept)
    tokenizer.chat_template = "{{ raise_exception('no system turns') }}"
    with pytest.raises(UserError, match=r"^chat=True: the chat template refuses a prompt: no system turns; change"):
        generate(model, tokenizer, ["a"], chat=True)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"^chat=True: the tokenizer of .* has no chat template; the adapter was"):
        generate(model, tokenizer, ["a"], chat=True)


@pytest.mark.parametrize("export_format", ["comol", "hf-exact", "vllm-lora", "lora", "merged"])
def test_every_export_has_the_template_of_the_training(export_format, kept, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = write_jsonl(tmp_path / "data.jsonl", sums(6))
    flags = ["--checkpoint", kept, "--format", export_format, "--output_dir", tmp_path / "out", "--calibration", data]
    export(parse([str(word) for word in flags]))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == TEMPLATE
    for path, content in tokenizer_files(tiny_tokenizer(), TEMPLATE).items():
        assert (tmp_path / "out" / path).read_bytes() == content


def test_bad_input(run):
    model, tokenizer = load_for_inference(run[0])
    with pytest.raises(UserError, match=r"^2 tasks for 1 prompts; give one per prompt$"):
        generate(model, tokenizer, ["a"], tasks=["b", "c"])
    with pytest.raises(UserError, match=r"^base 'no/such/base' cannot be read; give --model_name_or_path: "):
        load_for_inference(run[0], base="no/such/base")
