r"""What does a busy machine do to torch's threads, and do they have to spin?

    python benchmarks/threads.py

A step of training and a stretch of decoding on the shipped target, with 1 thread and with as many
as there are cores, with libgomp's usual waiting (threads spin), with short spinning (what the
command line sets) and with OMP_WAIT_POLICY=PASSIVE (they sleep), while none or several other
processes compute. Every combination is a process of its own, since the policy is read when torch
is loaded; combinations take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import machine

POLICIES = {
    "spinning": {},
    "briefly": {"GOMP_SPINCOUNT": "1000"},
    "sleeping": {"OMP_WAIT_POLICY": "PASSIVE"},
}


def work() -> None:
    """In the process that is measured: prints seconds of training and of decoding."""
    import torch

    from draft_opd.decoding.generate import speculate
    from draft_opd.drafters import FAMILIES
    from draft_opd.models.target import Target

    torch.manual_seed(0)
    target = Target.from_pretrained("embedded", device="cpu")
    drafter = FAMILIES["dflash"].create(target)
    ids = torch.randint(3, 250, (16, 128))

    def train() -> None:
        out = target.trajectories(ids, drafter.target_layers)
        context = drafter.build_cache(target, ids, out.features)
        anchors = torch.arange(8, 120, 8).expand(16, -1)
        block = torch.zeros(16, anchors.shape[1], drafter.draft_length, dtype=torch.long)
        at = ids.gather(1, anchors)
        drafter.replay(target, context, anchors, at, block).square().mean().backward()

    def decode() -> None:
        speculate(target, None, [ids[0].tolist()], max_new_tokens=24, stop_ids=())

    found = []
    for part, repeats in ((train, 3), (decode, 4)):
        part()
        began = time.perf_counter()
        for _ in range(repeats):
            part()
        found.append((time.perf_counter() - began) / repeats)
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", action="store_true", help="the measured part")
    args = parser.parse_args()
    if args.work:
        work()
    else:
        compare(args.repeats)


def compare(repeats: int) -> None:
    cores = os.cpu_count()
    sides = [
        (threads, policy, others)
        for others in (0, 1, cores)
        for threads in (1, cores)
        for policy in (POLICIES if threads > 1 else ["spinning"])
    ]
    found: dict[tuple, list[list[float]]] = {side: [] for side in sides}
    for repeat in range(repeats):
        for side in sides[:: 1 if repeat % 2 else -1]:
            threads, policy, others = side
            busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(others)]
            try:
                done = subprocess.run(
                    [sys.executable, __file__, "--work"],
                    env={**os.environ, "OMP_NUM_THREADS": str(threads), **POLICIES[policy]},
                    capture_output=True,
                    text=True,
                    check=True,
                )
            finally:
                for process in busy:
                    process.kill()
            found[side].append(json.loads(done.stdout))
    rows = []
    for (threads, policy, others), values in found.items():
        train, decode = zip(*values, strict=True)
        base = found[1, "spinning", others]
        rows.append(
            {
                "other_processes": others,
                "threads": threads,
                "waiting": policy,
                "train_seconds": statistics.median(train),
                "decode_seconds": statistics.median(decode),
                "train_over_one_thread": machine.ratio(list(train), [b[0] for b in base]),
                "decode_over_one_thread": machine.ratio(list(decode), [b[1] for b in base]),
            }
        )
        print(json.dumps(rows[-1]))
    machine.write("threads", {"rows": rows})


if __name__ == "__main__":
    main()
