"""What does a rejection cost a target whose layers keep states?

    python benchmarks/states.py

Random models of hidden size 1024 and 8 layers. A plain verification of a block whose predecessor was accepted
whole, against one that begins from a kept state and runs the accepted tokens again, in alternation; and the
bytes of a kept state.
"""

from __future__ import annotations

import argparse
import statistics
import time

import machine
import torch
import transformers

from draft_opd.models.stateful import snapshot
from draft_opd.models.target import Target

SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 4096,
}
KINDS = {
    "Qwen3.5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", {}),
    "LFM2": (
        "Lfm2Config",
        "Lfm2ForCausalLM",
        {"layer_types": ["conv", "conv", "full_attention", "conv"] * 2, "block_auto_adjust_ff_dim": False},
    ),
    "Falcon-H1": ("FalconH1Config", "FalconH1ForCausalLM", {"mamba_d_ssm": 2048, "mamba_n_heads": 32}),
}
CONTEXT = 128


def state_bytes(cache) -> int:
    """Tensors that a snapshot copies: keys and values are not among them."""
    kept = snapshot(cache)
    own = {id(x): x for layer in kept.layers for x in _tensors(vars(layer))}
    shared = {x.data_ptr() for layer in cache.layers for x in _tensors(vars(layer))}
    return sum(x.nbytes for x in own.values() if x.data_ptr() not in shared)


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for x in value.values():
            yield from _tensors(x)
    elif isinstance(value, (list, tuple)):
        for x in value:
            yield from _tensors(x)


@torch.inference_mode()
def measure(target: Target, block: int, accepted: int, repeats: int) -> dict:
    """Seconds of a verification of `block` + 1 tokens: plain, and behind a block of which `accepted`
    were right."""
    ids = torch.randint(3, 1000, (1, CONTEXT))
    cache = target.cache()
    target.trajectories(ids, cache=cache)
    tokens = torch.randint(3, 1000, (1, block + 1))
    row, times = cache.rows[0], {"plain": [], "rolled_back": []}
    at = CONTEXT
    for turn in range(2 * (repeats + 1)):
        side = "rolled_back" if turn % 2 else "plain"
        start = at if side == "plain" else at + accepted + 1
        positions = torch.arange(start, start + block + 1)[None]
        began = time.perf_counter()
        target.extend(tokens, positions, cache)
        if turn > 1:
            times[side].append(time.perf_counter() - began)
        if side == "rolled_back":
            at = row.end  # so that the next one is plain
    return {
        **{side: statistics.median(x) for side, x in times.items()},
        "rolled_back_over_plain": machine.ratio(times["rolled_back"], times["plain"]),
        "state_megabytes": state_bytes(row.cache) / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--block", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="states")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for kind, (config, model, more) in KINDS.items():
        torch.manual_seed(0)
        built = getattr(transformers, model)(getattr(transformers, config)(**{**SHAPE, **more}))
        target = Target(built, None, kind)
        for accepted in (0, args.block // 2):
            rows.append(
                {"kind": kind, "accepted": accepted, **measure(target, args.block, accepted, args.repeats)}
            )
            print(rows[-1])
    machine.write(args.name, {"arguments": vars(args), "rows": rows})


if __name__ == "__main__":
    main()
