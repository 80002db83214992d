"""Does Draft-OPD beat continued SFT on every seed of the demo?

    for s in 0 1 2; do draft-opd demo --seed $s --out runs/demo-seeds/$s; done
    python benchmarks/demo_seeds.py runs/demo-seeds/*

Gathers the summaries of finished demos into results/demo_seeds.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demos", nargs="+", type=Path)
    parser.add_argument("--name", default="demo_seeds")
    args = parser.parse_args()
    runs = [json.loads((folder / "summary.json").read_text()) for folder in args.demos]
    gains = [r["gain"] for r in runs]
    value = {
        "gain": {
            "mean": statistics.mean(gains),
            "sd": statistics.stdev(gains) if len(gains) > 1 else None,
            "positive": sum(g > 0 for g in gains),
            "of": len(gains),
        },
        "runs": runs,
    }
    print(json.dumps(value["gain"]))
    machine.write(args.name, value)


if __name__ == "__main__":
    main()
