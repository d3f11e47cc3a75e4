"""Make the demo's base model: train its tokenizer, pretrain a tiny Llama on `corpus`, write the model folder.

    OMP_NUM_THREADS=1 python -m comol_ds.demo.pretrain [--output_dir DIR] [--steps N]

Reproduces comol_ds/demo/model from nothing but this package (torch 2.9 or later, which has Muon). The 4500 steps, 72000
stories of about 104 tokens, took 22 minutes on one core of a 2-core machine and ended at a held-out loss of 0.825 per
token (perplexity 2.28). Most of what is left is chance: nobody can know which words a list will hold.
"""

import argparse
import io
import itertools
import math
import tempfile
import time
from pathlib import Path

import sentencepiece
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer, PreTrainedTokenizerBase

from comol_ds.demo import MODEL_DIR
from comol_ds.demo.corpus import stories

VOCAB_SIZE = 1024
MAX_LENGTH = 128  # tokens of one story; one in twelve is longer and is cut
BATCH_SIZE = 16  # stories per step
PEAK_LR, WARMUP_STEPS = 3e-3, 100
TRAIN_SEED, TOKENIZER_SEED, HELD_OUT_SEED = 0, 1, 2  # of the story streams


def train_tokenizer() -> PreTrainedTokenizerBase:
    """A SentencePiece BPE of the world's words, as a transformers tokenizer.

    No text is unknown to it (bytes are the fallback), digits stand alone, and neither a space nor a start mark is put
    before a text: the tokens of prompt + completion are those of the prompt followed by those of the completion.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=itertools.islice(stories(TOKENIZER_SEED), 5000),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        byte_fallback=True,
        split_digits=True,
        required_chars="".join(map(chr, range(33, 127))),
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "tokenizer.model").write_bytes(model.getvalue())
        return LlamaTokenizer.from_pretrained(folder, add_prefix_space=False, pad_token="<pad>")


def new_model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A Llama of 1.2 M parameters, randomly initialized."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Input ids and labels [B, MAX_LENGTH]: one story and its end mark per row, padded on the right."""
    rows = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]
    ids = torch.full((len(rows), MAX_LENGTH), tokenizer.pad_token_id)  # B, T
    for row, target in zip(rows, ids, strict=True):
        target[: len(row)] = torch.tensor(row[:MAX_LENGTH])
    return ids, ids.masked_fill(ids == tokenizer.pad_token_id, -100)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, count: int = 200) -> float:
    """Mean loss per token, in nats, over stories that were not trained on."""
    ids, labels = encode(tokenizer, list(itertools.islice(stories(HELD_OUT_SEED), count)))
    return model(input_ids=ids, labels=labels).loss.item()


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, head and norms.

    After 400 steps Muon's held-out loss was 1.33 where AdamW alone, at the same rate, had 1.37.
    """
    inner = [p for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2]
    outer = [p for name, p in model.named_parameters() if ".layers." not in name or p.ndim != 2]
    return [
        torch.optim.Muon(inner, lr=PEAK_LR, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def pretrain(steps: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Train on `steps` batches of new stories: a linear warm-up, then a cosine down to 0."""
    torch.manual_seed(TRAIN_SEED)
    tokenizer = train_tokenizer()
    model = new_model(tokenizer)
    rules = optimizers(model)
    stream = stories(TRAIN_SEED)
    start = time.monotonic()
    for step in range(1, steps + 1):
        rate = PEAK_LR * min(step / WARMUP_STEPS, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        ids, labels = encode(tokenizer, list(itertools.islice(stream, BATCH_SIZE)))
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for rule in rules:
            for group in rule.param_groups:
                group["lr"] = rate
            rule.step()
            rule.zero_grad()
        if step % 250 == 0 or step == steps:
            loss, seconds = held_out_loss(model, tokenizer), time.monotonic() - start
            print(f"step {step}/{steps}: held-out loss {loss:.3f}, {seconds:.0f} s", flush=True)
    return model.eval(), tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=MODEL_DIR)
    parser.add_argument("--steps", type=int, default=4500, help="optimizer steps of 16 stories")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the order of sums, and so the weights, depend on it
    model, tokenizer = pretrain(args.steps)
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
