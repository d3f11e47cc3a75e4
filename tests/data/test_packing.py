"""Packing: full bins, every record once, and the same losses as record by record on the models themselves."""

import numpy as np
import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from comol_ds.data.collate import packed_batch, padded_batch
from comol_ds.data.packing import join_records, pack
from comol_ds.data.tokenization import IGNORED


@pytest.mark.parametrize("seed", range(5))
def test_bins_hold_every_item_once_and_do_not_overflow(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 101, size=int(rng.integers(1, 400)))
    bins = pack(lengths, 100)
    assert sorted(item for items in bins for item in items) == list(range(len(lengths)))
    fill = [int(lengths[items].sum()) for items in bins]
    assert max(fill) <= 100
    # Best-fit-decreasing needs at most 11/9 of the optimum + 4 bins (Johnson et al., 1974).
    assert len(bins) <= 11 / 9 * np.ceil(lengths.sum() / 100) + 4 or max(lengths) > 50
    # No bin could be emptied into another one: any two together overflow, or best fit was not followed.
    assert len(bins) < 2 or sum(sorted(fill)[:2]) > 100


def test_known_cases():
    assert pack([], 10) == []
    assert pack([10, 10], 10) == [[0], [1]]
    assert pack([4, 6, 3, 7], 10) == [[3, 2], [1, 0]]
    assert pack([5, 5, 5], 10) == [[0, 1], [2]]
    assert pack([7, 8, 2], 10) == [[1, 2], [0]]  # the fullest bin that fits


def test_number_of_bins_does_not_depend_on_the_order():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 65, size=500)
    assert len({len(pack(rng.permutation(lengths), 64)) for _ in range(10)}) == 1


def test_many_short_records_fill_their_rows():
    lengths = np.random.default_rng(0).integers(10, 300, size=20_000)
    assert len(pack(lengths, 1024)) <= 1.001 * lengths.sum() / 1024 + 1


def record(number, ids, trained=None):
    labels = [IGNORED, *ids[1:]] if trained is None else [IGNORED] * (len(ids) - trained) + ids[-trained:]
    return {"record_id": f"x:{number}", "task": "t", "input_ids": ids, "labels": labels}


def test_joined_row_restarts_positions_and_masks_first_labels():
    row = join_records([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}])
    assert row == {
        "input_ids": [5, 6, 7, 8, 9],
        "labels": [IGNORED, 6, 7, IGNORED, 9],
        "position_ids": [0, 1, 2, 0, 1],
    }


def test_packed_batch_pads_with_one_more_sequence():
    batch = packed_batch([[record(1, [5, 6]), record(2, [7, 8, 9])], [record(3, [4, 4])]], pad_token_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [4, 4, 0, 0, 0]]
    assert batch["labels"][1].tolist() == [IGNORED, 4, IGNORED, IGNORED, IGNORED]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 1, 0, 1, 2]]
    assert batch["record_index"].tolist() == [[0, 0, 1, 1, 1], [2, 2, -1, -1, -1]]
    assert batch["record_ids"] == ["x:1", "x:2", "x:3"] and "attention_mask" not in batch


SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
# Windows shorter than the records, so that sliding attention must count positions within the record too.
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES)),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=6)),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig(**SIZES, sliding_window=6, layer_types=["sliding_attention", "full_attention"]),
    ),
}


def token_losses(model, batch) -> torch.Tensor:
    """Loss of every predicted position, 0 where there is no label, [B, T - 1]."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch}
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits  # [B, T, V]
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], ignore_index=IGNORED, reduction="none"
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_loss_equals_the_records_own_losses(name, attention):
    model_class, config = MODELS[name]
    torch.manual_seed(0)
    config._attn_implementation = attention
    model = model_class(config).float().eval()
    # Default initial weights attend almost evenly and hardly tell tokens apart; larger ones make leaks visible.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    rng = np.random.default_rng(1)
    records = [record(i, rng.integers(3, 96, size=size).tolist()) for i, size in enumerate((1, 17, 9, 1, 12, 30, 5))]
    alone = [token_losses(model, padded_batch([one], 0))[0] for one in records]
    sums = torch.stack([losses.sum() for losses in alone])
    padded = token_losses(model, padded_batch(records, 0))
    torch.testing.assert_close(padded.sum(1), sums, rtol=1e-5, atol=1e-5)
    # The second row is padded by 35 tokens, the third is a single record.
    bins = [records[:5], records[6:], records[5:6]]
    packed = token_losses(model, packed_batch(bins, 0))
    torch.testing.assert_close(packed.sum(1), torch.stack([sums[:5].sum(), sums[6], sums[5]]), rtol=1e-5, atol=1e-5)
    second_record = packed[0, 1:17]  # after one token of the first
    torch.testing.assert_close(second_record, alone[1], rtol=1e-5, atol=1e-5)
    leaking = packed_batch(bins, 0)
    leaking["attention_mask"] = torch.ones_like(leaking["input_ids"])
    leak = (token_losses(model, leaking)[0] - packed[0]).abs().max()
    assert leak > 1e-2, "the test could not see attention across records"
