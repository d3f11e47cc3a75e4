"""A tokenizer trained in memory, files of records, and the real data beside the repository."""

import json
import os
from functools import cache
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from comol_ds.config import DataSettings
from comol_ds.data.formats import parse_columns
from comol_ds.data.sources import find_sources, read_texts
from comol_ds.errors import UserError

REAL_DATA = Path(__file__).parents[3] / "shared" / "data"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TEXT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request. "
    "The cat sat on the mat and the dog ran to the red house. One two three four five six seven eight nine ten. "
    "How many apples are there? There are twelve apples.\n\n### Instruction:\n### Response:\n### Input:\n"
)


@cache
def _byte_level_bpe() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(chat: bool = True, adds: str = "bos") -> PreTrainedTokenizerFast:
    """Byte-level BPE of 400 ids; `adds` is what it puts around a text by itself: "", "bos" or "bos eos"."""
    backend = Tokenizer.from_str(_byte_level_bpe())
    if adds:
        single = "<s> $A </s>" if adds == "bos eos" else "<s> $A"
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", name_or_path="tiny"
    )
    tokenizer.chat_template = CHAT_TEMPLATE if chat else None
    return tokenizer


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def sums(count: int, task: str | None = None) -> list[dict]:
    """Prompt/completion records of different lengths."""
    rows = [
        {"prompt": f"How many is {i} and {'one ' * (i % 7)}?", "completion": f" There are {i}."} for i in range(count)
    ]
    return [row | {"task": task} for row in rows] if task else rows


def settings(*data_sets: str, **changes) -> DataSettings:
    return DataSettings(**{"dataset": list(data_sets), "max_length": 128, **changes})


def real_data(name: str) -> Path:
    """A file of the real data; where it is missing the test is skipped, or fails if COMOL_REQUIRE_ALL=1."""
    path = REAL_DATA / name
    if not path.exists():
        message = f"real data missing: {path}"
        if os.environ.get("COMOL_REQUIRE_ALL") == "1":
            pytest.fail(message)
        pytest.skip(message)
    return path


def read(path, split: str = "train", data_format: str = "auto", columns: str | None = None) -> list[dict[str, str]]:
    """The records of one data set."""
    (group,) = find_sources([str(path)], split, data_format, renamed=parse_columns(columns))
    return list(read_texts(group))


def refused(path, **options) -> str:
    """The one line with which `read` refuses a data set."""
    with pytest.raises(UserError) as error:
        read(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)
