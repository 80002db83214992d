r"""Does a draft tree pay, against a chain?

    python benchmarks/trees.py --drafter runs/eagle/sft-0/last \
        --trajectories runs/league/validation

Every shape decodes the same prompts, one at a time, in one process and in alternation. τ and the
check that the text is the target's own are over all prompts; the speed is each shape's decoding
time on a prompt, against the chain as trained and against the target alone.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import machine
import torch

from draft_opd.data.trajectory import read_trajectories
from draft_opd.decoding.generate import Timing, speculate
from draft_opd.decoding.rounds import tau
from draft_opd.drafters import Drafter
from draft_opd.models.target import Target

# As many nodes as the chain, twice and four times as many; deep and broad.
SHAPES = {
    "chain 15": None,
    "chain 7": 7,
    "tree 15: 3,3,3,2,2,1,1": (3, 3, 3, 2, 2, 1, 1),
    "tree 22: 2x7,1x8": (2,) * 7 + (1,) * 8,
    "tree 30: 2x15": (2,) * 15,
    "tree 30: 4x6,3,3": (4,) * 6 + (3, 3),
    "tree 60: 4x15": (4,) * 15,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="embedded")
    parser.add_argument("--drafter", required=True)
    parser.add_argument("--trajectories", required=True, type=Path)
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--name", default="trees")
    args = parser.parse_args()
    torch.set_num_threads(1)
    target = Target.from_pretrained(args.target)
    drafter = Drafter.from_pretrained(args.drafter, device=target.device)
    rows = read_trajectories(args.trajectories)[: args.limit]
    sides = {"target alone": (None, None), **{n: (drafter, s) for n, s in SHAPES.items()}}
    seconds = {name: [] for name in sides}
    rounds = {name: [] for name in SHAPES}
    same = dict.fromkeys(SHAPES, 0)
    for i, row in enumerate(rows):
        order = list(sides) if i % 2 else list(sides)[::-1]
        for name in order:
            which, shape = sides[name]
            clock = Timing()
            made = speculate(
                target,
                which,
                [row.prompt_ids],
                max_new_tokens=len(row.response_ids),
                draft_length=shape if isinstance(shape, int) else None,
                tree=shape if isinstance(shape, tuple) else None,
                timing=clock,
            )[0]
            seconds[name].append(clock.decode)
            if which is not None:
                rounds[name] += made.rounds
                same[name] += made.token_ids == row.response_ids
    found = []
    for name in SHAPES:
        found.append(
            {
                "shape": name,
                "tau": tau(rounds[name]),
                "same_text": same[name],
                "of": len(rows),
                "speedup": machine.ratio(seconds["target alone"], seconds[name]),
                "against_chain": machine.ratio(seconds["chain 15"], seconds[name]),
                "milliseconds_a_round": 1000 * sum(seconds[name]) / len(rounds[name]),
            }
        )
        print(
            f"{name:26} τ {found[-1]['tau']:6.3f}  text {same[name]}/{len(rows)}  speed-up "
            f"{found[-1]['speedup']['median']:.2f}  to the chain "
            f"{found[-1]['against_chain']['median']:.2f}"
        )
    alone = 1000 * statistics.mean(seconds["target alone"])
    value = {"drafter": args.drafter, "milliseconds_alone": alone, "shapes": found}
    machine.write(args.name, value)


if __name__ == "__main__":
    main()
