r"""Hindsight traces: round by round, or by drafting at every position first? And by batch size?

    python benchmarks/trace.py --trajectories runs/demo/data/train \
        --drafter runs/demo/untrained --drafter runs/demo/sft/last

Both on the same features and texts, in one process and in alternation; the rounds are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import machine
import torch

from draft_opd.data.trajectory import read_trajectories
from draft_opd.decoding.rounds import tau
from draft_opd.drafters import Drafter
from draft_opd.models.target import Target
from draft_opd.training.batches import BatchSource
from draft_opd.training.rollouts import hindsight_rollout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="embedded")
    parser.add_argument("--drafter", action="append", required=True)
    parser.add_argument("--trajectories", required=True)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="trace")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    target = Target.from_pretrained(args.target)
    texts = read_trajectories(args.trajectories, limit=max(args.batches) * args.repeats)
    rows = []
    for path in args.drafter:
        drafter = Drafter.from_pretrained(path, device=target.device)
        for size in args.batches:
            source = BatchSource(target, drafter.target_layers)
            times: dict[bool, list[float]] = {False: [], True: []}
            same, rounds = True, []
            for repeat in range(args.repeats + 1):
                start = max(0, repeat - 1) * size
                batch = source.batch(texts[start : start + size])
                found = {}
                for at_once in (False, True) if repeat % 2 else (True, False):
                    began = time.perf_counter()
                    with torch.autocast(
                        target.device.type, torch.bfloat16, enabled=args.precision == "bfloat16"
                    ):
                        found[at_once] = hindsight_rollout(
                            target,
                            drafter,
                            batch,
                            drafter.draft_length,
                            whole=False,
                            at_once=at_once,
                        )
                    if repeat:
                        times[at_once].append(time.perf_counter() - began)
                where = [[(r.anchor, r.accepted) for t in f for r in t] for f in found.values()]
                same &= where[0] == where[1]
                rounds += [r for t in found[False] for r in t]
            rows.append(
                {
                    "drafter": path,
                    "batch": size,
                    "tau": tau(rounds),
                    "walk_seconds": statistics.median(times[False]),
                    "everywhere_seconds": statistics.median(times[True]),
                    "walk_over_everywhere": machine.ratio(times[False], times[True]),
                    "same_rounds": same,
                }
            )
            print(json.dumps(rows[-1]))
    machine.write(args.name, {"arguments": vars(args), "rows": rows})


if __name__ == "__main__":
    main()
