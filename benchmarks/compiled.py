r"""Does torch.compile make decoding on a CPU faster than packed matrices, and for what a wait?

    python benchmarks/compiled.py --target embedded

A forward of 1 and of 16 tokens behind a context, over a cache of fixed size: as torch runs it, with
our packed matrices, compiled by inductor, and compiled with frozen (prepacked) weights; all in one
process and in alternation. Needs a C++ compiler.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import machine
import torch
from torch import nn

from draft_opd.evaluation.measure import rotated
from draft_opd.models.cpu_linear import PrepackedLinear
from draft_opd.models.kv_cache import PositionCache
from draft_opd.models.target import Target

CONTEXT, CAPACITY = 128, 256


def make_step(target: Target):
    """ids [1, m], positions [1, m] -> the target's tokens, over a cache that never moves."""
    c = target.config
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    stores = [
        [torch.zeros(1, c.num_key_value_heads, CAPACITY, width) for _ in range(target.num_layers)]
        for _ in range(2)
    ]
    cache = PositionCache.of(*stores)
    cache.set_bound(CAPACITY)
    key = torch.arange(CAPACITY)[None]

    def step(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        cache.positions, cache.visible, cache.branch, cache._start = (
            positions,
            CAPACITY,
            False,
            None,
        )
        mask = target.masks(key[:, None] <= positions[:, :, None], positions, key)
        out = target.decoder(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        )
        return target.head(out.last_hidden_state).argmax(-1)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="embedded")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="compiled")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    target = Target.from_pretrained(args.target, device="cpu")
    linears = [m for m in target.model.modules() if type(m) is PrepackedLinear]

    def as_torch() -> None:
        for module in linears:
            module.__class__ = nn.Linear

    rows = []
    for tokens in (1, 16):
        ids = torch.randint(3, 250, (1, tokens))
        at = torch.arange(CONTEXT, CONTEXT + tokens)[None]
        sides, waits = {}, {}
        as_torch()
        for name, freezing in (("compiled", False), ("compiled and frozen", True)):
            torch._dynamo.reset()
            import torch._inductor.config as inductor

            inductor.freezing = freezing
            sides[name] = torch.compile(make_step(target), dynamic=False)
            began = time.perf_counter()
            with torch.no_grad():
                for _ in range(2):
                    sides[name](ids, at)
            waits[name] = time.perf_counter() - began
        sides = {"torch": make_step(target), "ours": make_step(target), **sides}
        times: dict[str, list[float]] = {side: [] for side in sides}
        for repeat in range(-1, args.repeats):
            for side, step in rotated(list(sides.items()), repeat):
                kind = PrepackedLinear if side == "ours" else nn.Linear
                for module in linears:
                    module.__class__ = kind
                with torch.no_grad():
                    if repeat < 0:
                        step(ids, at)
                    began = time.perf_counter()
                    step(ids, at)
                if repeat >= 0:
                    times[side].append(time.perf_counter() - began)
        rows.append(
            {
                "tokens": tokens,
                "milliseconds": {s: 1000 * statistics.median(t) for s, t in times.items()},
                "torch_over": {s: machine.ratio(times["torch"], t) for s, t in times.items() if s != "torch"},
                "seconds_to_compile": waits,
            }
        )
        print(json.dumps(rows[-1]))
    machine.write(args.name, {"arguments": vars(args), "rows": rows})


if __name__ == "__main__":
    main()
