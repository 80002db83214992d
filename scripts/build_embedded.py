"""Makes the embedded target: tokenizer, model and prompts (about half an hour on two CPU cores).

    python scripts/build_embedded.py [--steps 800] [--out src/draft_opd/embedded/model]

The result ships in the package; this script is the record of how it came to be.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from draft_opd.embedded.problems import problems

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"]
THINK = ["<think>", "</think>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
TRAIN_PROMPTS, HELDOUT_PROMPTS, CORPUS = 3000, 200, 60000


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with 1024 entries; digits stay single, as in the models we imitate."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d| ?[A-Za-z]+| ?[^\sA-Za-z\d]|\s"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=1024,
            special_tokens=SPECIAL + THINK,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        mask_token="<|mask|>",
        chat_template=TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def build_model(vocab_size: int, eos: int, pad: int) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=192,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        intermediate_size=448,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=eos,
        bos_token_id=None,
        pad_token_id=pad,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    return Qwen3ForCausalLM(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("src/draft_opd/embedded/model"))
    args = parser.parse_args()
    torch.manual_seed(0)

    drawn = problems(TRAIN_PROMPTS + HELDOUT_PROMPTS + CORPUS, seed=20260529)
    questions = list(dict.fromkeys(p.question for p in drawn))
    held_out = questions[:HELDOUT_PROMPTS]
    train = questions[HELDOUT_PROMPTS : HELDOUT_PROMPTS + TRAIN_PROMPTS]
    reserved = set(held_out)
    corpus = [p for p in drawn if p.question not in reserved]

    tokenizer = build_tokenizer([p.question + "\n" + p.response for p in corpus[:8000]])
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(args.out)
    for name, rows in (("train", train), ("heldout", held_out)):
        path = args.out.parent / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"prompt": q}) + "\n" for q in rows))

    def encode(p):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": p.question}], add_generation_prompt=True, tokenize=False
        )
        return tokenizer.encode(prompt + p.response + "<|im_end|>", add_special_tokens=False)

    rows = sorted((encode(p) for p in corpus), key=len)
    print("tokens", sum(map(len, rows)), "mean", sum(map(len, rows)) / len(rows), flush=True)
    batches = [rows[i : i + args.batch] for i in range(0, len(rows) - args.batch, args.batch)]
    pad = tokenizer.pad_token_id
    model = build_model(len(tokenizer), tokenizer.eos_token_id, pad)
    print("parameters", sum(p.numel() for p in model.parameters()), "vocab", len(tokenizer))

    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    base = [g["lr"] for o in optimizers for g in o.param_groups]
    rng, order, began = random.Random(0), [], time.time()
    for step in range(args.steps):
        if not order:
            order = rng.sample(range(len(batches)), len(batches))
        batch = batches[order.pop()]
        width = max(map(len, batch))
        ids = torch.tensor([r + [pad] * (width - len(r)) for r in batch])
        labels = ids.masked_fill(ids == pad, -100)
        scale = min(1.0, (step + 1) / 30, 0.02 + (args.steps - step) / (0.5 * args.steps))
        for optimizer, lr in zip(optimizers, base, strict=True):
            optimizer.param_groups[0]["lr"] = lr * scale
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 10 == 0 or step == args.steps - 1:
            print(f"{step} loss {loss.item():.4f} {time.time() - began:.0f} s", flush=True)
            if not math.isfinite(loss.item()):
                raise SystemExit("training diverged")
        if step % 200 == 199 or step == args.steps - 1:
            copy.deepcopy(model).to(torch.bfloat16).save_pretrained(args.out)


if __name__ == "__main__":
    main()
