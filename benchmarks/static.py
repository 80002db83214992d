"""The static step, uncaptured, against the dynamic loop on this machine; and what walking layers saves.

    python benchmarks/static.py --drafter tests/drafters/dflash/last

Sides in one process and in alternation, prompt by prompt, one thread; the text must be the same. On a GPU
the static step is captured (`make evidence`, phase `rounds`); on a CPU it is what tests compare with.
"""

from __future__ import annotations

import argparse
import time

import machine
import torch

from draft_opd.data.prompts import read_prompts
from draft_opd.decoding import generate as loop
from draft_opd.decoding.static import eager
from draft_opd.drafters.base import Drafter
from draft_opd.evaluation.measure import rotated
from draft_opd.models.target import Target

dynamic = loop._decode_dynamic


def static(job, length, tree, pace, clock, timed):
    loop._decode_static(job, length, None, pace, clock, eager)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="embedded")
    parser.add_argument("--drafter", required=True)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=120)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--name", default="static")
    args = parser.parse_args()
    torch.set_num_threads(1)
    target = Target.from_pretrained(args.target, device="cpu")
    drafter = Drafter.from_pretrained(args.drafter, device="cpu")
    drafter.bind(target)
    walk = target.walk
    sides = {"dynamic": (dynamic, walk), "dynamic, hooks": (dynamic, None), "static": (static, walk)}
    prompts = [p.ids(target) for p in read_prompts("embedded:heldout", args.prompts)]
    found = {}
    for name, helper in (("target alone", None), (drafter.family, drafter)):
        seconds = {side: [] for side in sides}
        for i, prompt in enumerate([prompts[0], *prompts * args.repeats]):
            texts = set()
            for side in rotated(list(sides), i):
                loop._decode_dynamic, target.walk = sides[side]
                began = time.perf_counter()
                (made,) = loop.speculate(target, helper, [prompt], max_new_tokens=args.tokens)
                if i:  # the first one warms up
                    seconds[side].append((time.perf_counter() - began) / len(made.token_ids))
                texts.add(tuple(made.token_ids))
            assert len(texts) == 1
        found[name] = {
            side: {
                "tokens_per_second": 1 / torch.tensor(times).median().item(),
                "time_over_dynamic": machine.ratio(times, seconds["dynamic"]),
            }
            for side, times in seconds.items()
        }
        for side, value in found[name].items():
            rate = value["tokens_per_second"]
            print(f"{name:14} {side:16} {rate:7.1f} tok/s", value["time_over_dynamic"])
    machine.write(args.name, {"target": args.target, "drafter": args.drafter, "sides": found})


if __name__ == "__main__":
    main()
