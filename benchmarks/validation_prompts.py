"""Prompts of the embedded target's kind that are neither its training nor its held-out ones.

    python benchmarks/validation_prompts.py > runs/validation.jsonl
    python benchmarks/validation_prompts.py --count 8000 --seed 4242 --but runs/validation.jsonl

The first are for measuring, the second are more text to train on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from draft_opd.data.prompts import read_prompts
from draft_opd.embedded.problems import problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=777)
    parser.add_argument("--but", type=Path, help="a file of prompts that must not be drawn again")
    args = parser.parse_args()
    known = {
        p.messages[0]["content"] for name in ("train", "heldout") for p in read_prompts(f"embedded:{name}")
    }
    if args.but:
        known |= {json.loads(line)["prompt"] for line in args.but.read_text().splitlines()}
    drawn = dict.fromkeys(p.question for p in problems(3 * args.count, seed=args.seed))
    fresh = [q for q in drawn if q not in known][: args.count]
    for i, question in enumerate(fresh):
        print(json.dumps({"id": f"{'m' if args.but else 'v'}{i}", "prompt": question}))


if __name__ == "__main__":
    main()
