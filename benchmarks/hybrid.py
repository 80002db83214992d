"""Does a drafter of a hybrid target gain from SFT and from Draft-OPD?

    python benchmarks/hybrid.py --texts runs/demo/data/train --out runs/hybrid

A small Qwen3.5 (three GatedDeltaNet layers to one of attention) learns the shipped target's text. Then it
is a target like any other: it answers prompts, a DFlash drafter learns its answers (SFT), and goes on with
SFT and with Draft-OPD (D-PACE). Held-out τ of all, and whether decoding gives the target's own text.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import machine
import torch
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from draft_opd.data.collect import collect
from draft_opd.data.prompts import read_prompts
from draft_opd.data.trajectory import read_trajectories
from draft_opd.decoding.generate import speculate
from draft_opd.drafters import Drafter
from draft_opd.models.rows import pad_rows
from draft_opd.models.target import Target
from draft_opd.training.config import parse_recipe
from draft_opd.training.trainer import Run


def make_target(texts: str, out: Path, steps: int, shape: dict) -> None:
    """Trains a small hybrid model on texts and saves it with the shipped tokenizer."""
    if (out / "config.json").exists():
        return
    teacher = Target.from_pretrained("embedded", device="cpu")
    rows = read_trajectories(texts)
    torch.manual_seed(0)
    generation = {"eos_token_id": sorted(teacher.stop_ids), "bos_token_id": teacher.tokenizer.bos_token_id}
    config = Qwen3_5TextConfig(vocab_size=teacher.vocab_size, **shape, **generation)
    model = Qwen3_5ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    rng = random.Random(0)
    for step in range(steps):
        batch = rng.sample(rows, 8)
        ids = pad_rows([t.ids for t in batch], torch.device("cpu"))
        labels = pad_rows([t.ids for t in batch], torch.device("cpu"), -100)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"target: step {step}, loss {loss.item():.3f}", flush=True)
    model.generation_config.eos_token_id = sorted(teacher.stop_ids)
    model.save_pretrained(out)
    teacher.tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/hybrid"))
    parser.add_argument("--target-steps", type=int, default=1200)
    parser.add_argument("--train", type=int, default=400, help="prompts")
    parser.add_argument("--heldout", type=int, default=80)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--sft", type=int, default=800)
    parser.add_argument("--more", type=int, default=250)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--name", default="hybrid")
    args = parser.parse_args()
    shape = {
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 24,
        "linear_value_head_dim": 24,
        "max_position_embeddings": 1024,
    }
    place = args.out / "target"
    make_target(args.texts, place, args.target_steps, shape)
    target = Target.from_pretrained(str(place), device="cpu")
    for part, count in (("train", args.train), ("heldout", args.heldout)):
        prompts = read_prompts(f"embedded:{part}", count)
        collect(target, prompts, args.out / part, max_new_tokens=args.tokens, batch_size=8)
        print(f"collected {part}", flush=True)
    seeds = []
    for seed in range(args.seeds):
        common = {
            "target": str(place),
            "seed": seed,
            "batch_size": args.batch,
            "data": {
                "trajectories": str(args.out / "train"),
                "heldout": str(args.out / "heldout"),
                "cache_features": "memory",
            },
            "evaluation": {"every": 1000},
            "sft": {"anchors": 16},
        }
        stages = {
            "sft": ("sft", args.sft, 3e-3, {"model": {"options": {"num_layers": 2, "block_size": 8}}}),
            "sft_continued": ("sft", args.more, 5e-4, {}),
            "draft_opd": ("opd", args.more, 5e-4, {"opd": {"objective": {"kind": "dpace"}}}),
        }
        found = {}
        for name, (stage, steps, rate, options) in stages.items():
            tree = {**common, "out": str(args.out / f"{name}-{seed}"), "steps": steps, **options}
            tree["optim"] = {"name": "muon", "learning_rate": rate}
            if name != "sft":
                tree["drafter"] = str(args.out / f"sft-{seed}" / "last")
            resume = Path(tree["out"]).exists()
            found[name] = Run(stage, parse_recipe(tree), target=target, resume=resume).train().tau
            print(seed, name, found[name], flush=True)
        seeds.append(found)
    drafter = Drafter.from_pretrained(str(args.out / "draft_opd-0" / "last"), device="cpu")
    texts = read_trajectories(args.out / "heldout")
    began = time.perf_counter()
    limits = [len(t.response_ids) for t in texts]
    made = speculate(target, drafter, [t.prompt_ids for t in texts], max_new_tokens=limits)
    same = sum(g.token_ids == t.response_ids for g, t in zip(made, texts, strict=True))
    value = {"taus": seeds, "same_text": same, "texts": len(texts), "seconds": time.perf_counter() - began}
    print(value)
    machine.write(args.name, {"arguments": {k: str(v) for k, v in vars(args).items()}, **value})


if __name__ == "__main__":
    main()
