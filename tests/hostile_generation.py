"""Values of a generation configuration that change what greedy decoding writes."""

from collections.abc import Iterator
from typing import Any

from transformers import GenerationConfig

# What a generation_config.json may hold and plain `model.generate(do_sample=False)` obeys.
HOSTILE: dict[str, Any] = {
    "repetition_penalty": 3.0,
    "no_repeat_ngram_size": 1,
    "encoder_repetition_penalty": 5.0,
    "encoder_no_repeat_ngram_size": 1,
    "suppress_tokens": list(range(3, 390)),
    "begin_suppress_tokens": list(range(3, 390)),
    "bad_words_ids": [[token] for token in range(3, 390)],
    "sequence_bias": [[[399], 1e9]],
    "forced_eos_token_id": 398,
    "exponential_decay_length_penalty": [0, 1e6],
    "num_beams": 7,
    "guidance_scale": 9.0,
}
# They end an answer, or fill what follows its end.
_SPECIAL_TOKENS = {"bos_token_id", "eos_token_id", "pad_token_id"}


def hostile_values(config: GenerationConfig) -> Iterator[tuple[str, Any]]:
    """Every setting that a configuration of this release of transformers knows, with a value that it should not have.

    A setting without a value above gets 1: nothing of a base may be obeyed, so it does not matter what it means.
    """
    for name in vars(config):
        if not name.startswith("_") and name not in _SPECIAL_TOKENS:
            yield name, HOSTILE.get(name, 1)
