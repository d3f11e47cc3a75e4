"""Pieces of a text get the ids of the whole text: tokenizers that put a space before a text do so once."""

from functools import cache

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from comol_ds.data.token_ids import piece_ids
from tests.data import chat_templates as templates
from tests.data.chat_templates import SPECIALS, chat_tokenizer
from tests.data.data_helpers import TEXT, tiny_tokenizer
from tests.data.test_chat import CHAT, encode, learned, served

# How tokenizers write the space before a text: Llama 2 and Mistral 0.1; Mistral 0.3 and later; T5.
SPACED = {
    "normalizer": (normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None),
    "first": (None, pre_tokenizers.Metaspace(prepend_scheme="first")),
    "always": (None, pre_tokenizers.Metaspace(prepend_scheme="always")),
}


@cache
def _trained() -> str:
    """Merges of words that begin with their space, as SentencePiece learns them."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=sorted(set("▁" + TEXT + "[]/INSTuserassistant:")),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT.replace("\n", " ")] * 4, trainer)
    return tokenizer.to_str()


def spaced_tokenizer(kind: str, template: str):
    backend = Tokenizer.from_str(_trained())
    normalizer, pre_tokenizer = SPACED[kind]
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizer
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", name_or_path="tiny"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIALS[template]})
    tokenizer.chat_template = template
    return tokenizer


def whole_ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("template", [templates.MISTRAL, templates.PHI35, templates.GEMMA, templates.PLAIN])
@pytest.mark.parametrize("kind", SPACED)
def test_a_conversation_has_the_ids_that_serving_sends(kind, template):
    tokenizer = spaced_tokenizer(kind, template)
    record = encode(tokenizer, CHAT)
    ids = record["input_ids"][:-1] if template == templates.PLAIN else record["input_ids"]
    assert served(tokenizer, CHAT)[: len(ids)] == ids
    prompt = served(tokenizer, CHAT[:3], add_generation_prompt=True)
    if template != templates.PLAIN:  # whose prompt ends with a space that belongs to the answer's first token
        assert record["input_ids"][: record["prompt_length"]] == prompt
    assert len(learned(tokenizer, record)) == 2


@pytest.mark.parametrize("kind", SPACED)
@pytest.mark.parametrize(("prompt", "completion"), [("How many?", " Twelve."), ("How many?\n", "Twelve.")])
def test_a_completion_goes_on_where_its_prompt_ends(kind, prompt, completion):
    tokenizer = spaced_tokenizer(kind, templates.MISTRAL)
    ((before, after),) = piece_ids(tokenizer, [[prompt, completion]])
    assert before == whole_ids(tokenizer, prompt)
    assert before + after == whole_ids(tokenizer, prompt + completion)
    if kind == "normalizer" or not completion.startswith(" "):
        assert whole_ids(tokenizer, completion) != after, "the case must differ from the completion on its own"


@pytest.mark.parametrize("kind", SPACED)
def test_a_token_does_not_reach_across_a_border(kind):
    tokenizer = spaced_tokenizer(kind, templates.MISTRAL)
    before, after = piece_ids(tokenizer, [["on the m", "at and"]])[0]
    assert before + after != whole_ids(tokenizer, "on the mat and"), "the case must merge across the border"
    assert before == whole_ids(tokenizer, "on the m")
    assert tokenizer.convert_ids_to_tokens(after)[0].startswith("a")  # and no space


def test_pieces_of_many_texts_keep_their_places():
    tokenizer = tiny_tokenizer()
    texts = [["the ca", "t sat", " on"], [], ["How many?"], ["\n", "\n\n", "two"], ["one ", " two"]]
    assert piece_ids(tokenizer, texts) == [[whole_ids(tokenizer, piece) for piece in pieces] for pieces in texts]


def test_a_special_token_that_takes_the_space_behind_it_takes_it_from_the_answer():
    tokenizer = chat_tokenizer(templates.PHI35)
    tokenizer.add_tokens([_stripping("<|assistant|>"), _stripping("<|end|>")], special_tokens=True)
    record = encode(tokenizer, CHAT)
    assert record["input_ids"] == served(tokenizer, CHAT)[: record["length"]]
    assert learned(tokenizer, record) == ["Twelve.<|end|>", "Ten.<|end|>"]


def _stripping(token: str):
    return AddedToken(token, rstrip=True, special=True, normalized=False)
