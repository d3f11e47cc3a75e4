"""The tokenizer beside an adapter, as PEFT's users keep it, with the chat template that wrote the training data.

An adapter answers well what is asked as it was trained, and the base's tokenizer may have another template, or none.
"""

import os
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PreTrainedTokenizerBase
from transformers.utils import CHAT_TEMPLATE_DIR

from comol_ds.files import replace_file

# What tokenizers write: save_pretrained's files, the vocabularies of those that have files of their own, and the code
# of those that transformers loads with trust_remote_code.
_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "tekken.json", "tokenization*.py",
    "chat_template*", f"{CHAT_TEMPLATE_DIR}/*",
)  # fmt: skip
_CONFIG = "tokenizer_config.json"


def tokenizer_files(tokenizer: PreTrainedTokenizerBase, chat_template: str | dict[str, str] | None) -> dict[str, bytes]:
    """The files that ``tokenizer.save_pretrained`` writes, path -> content.

    Args:
        tokenizer: is left as it is.
        chat_template: takes the place of the tokenizer's own; None: the files have none.
    """
    kept = deepcopy(tokenizer)
    kept.chat_template = chat_template
    backend = getattr(kept, "backend_tokenizer", None)
    if backend is not None:  # left over from earlier calls, which are not the same in every run
        backend.no_padding()
        backend.no_truncation()
    with TemporaryDirectory() as folder:
        kept.save_pretrained(folder)
        files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def has_tokenizer(folder: str | os.PathLike) -> bool:
    """Whether a tokenizer lies in the folder."""
    return (Path(folder) / _CONFIG).is_file()


def tokenizer_paths(folder: str | os.PathLike) -> list[Path]:
    """The tokenizer's files in a folder, among others."""
    found = {path for pattern in _FILES for path in Path(folder).glob(pattern) if path.is_file()}
    return sorted(found)


def read_tokenizer_files(folder: str | os.PathLike) -> dict[str, bytes]:
    """The tokenizer's files in a folder, path -> content; empty without any."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in tokenizer_paths(folder)}


def write_tokenizer_files(files: Mapping[str, bytes], folder: str | os.PathLike) -> None:
    """Write a tokenizer into a folder, over one that is there; chat templates that are not its own go.

    Args:
        files: of `tokenizer_files` or `read_tokenizer_files`; with none, nothing is done.
        folder: must exist.
    """
    folder = Path(folder)
    templates = [*folder.glob("chat_template*"), *folder.glob(f"{CHAT_TEMPLATE_DIR}/*")]
    for path in templates if files else ():
        if str(path.relative_to(folder)) not in files:
            path.unlink()
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        replace_file(folder / name, [content])
