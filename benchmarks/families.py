"""Both families side by side, on the seeds that both have.

    draft-opd ablate --config benchmarks/league.yaml --out runs/league/runs
    draft-opd ablate --config benchmarks/eagle3.yaml --out runs/eagle/runs
    python benchmarks/families.py benchmarks/results/league.json runs/eagle/runs/ablation.json \
        --runs runs/league/sft-1 runs/eagle/sft-1

Same target, data, steps, batches and number of blocks; `--runs` are an SFT run of each, for the
parameters and the tokens that SFT supervised.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import machine

ROWS = (
    "sft_continued",
    "ce_replay",
    "auf",
    "dpace",
    "dpace_random",
    "expected_length+ce",
    "paper",
    "paper_random_anchors",
    "paper_accepted_only",
    "forward_kl",
)


def side(path: Path, run: Path, seeds: set[int]) -> dict:
    rows = [r for r in json.loads(path.read_text())["runs"] if r["seed"] in seeds]
    at = {(r["variant"], r["seed"]): r for r in rows}
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    about = json.loads((run / "run.json").read_text())
    found = {
        "parameters": about["drafter_parameters"],
        "sft_supervised_tokens": sum(x.get("supervised", 0) for x in lines),
        "sft": [at["sft_continued", s]["start"] for s in sorted(seeds)],
        "variants": {},
    }
    for name in ROWS:
        if all((name, s) in at for s in seeds):
            mine = [at[name, s] for s in sorted(seeds)]
            gains = [100 * (r["tau"] / at["sft_continued", r["seed"]]["tau"] - 1) for r in mine]
            found["variants"][name] = {
                "tau": [r["tau"] for r in mine],
                "percent_to_continued": [statistics.mean(gains), statistics.stdev(gains)],
                "wins": sum(g > 0 for g in gains),
                "supervised_tokens": round(statistics.mean(r["supervised"] for r in mine)),
                "seconds": round(statistics.mean(r["seconds"] for r in mine), 1),
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs=2, type=Path, help="DFlash's, EAGLE-3's")
    parser.add_argument("--runs", nargs=2, type=Path, required=True)
    args = parser.parse_args()
    seeds = [{r["seed"] for r in json.loads(p.read_text())["runs"]} for p in args.results]
    both = seeds[0] & seeds[1]
    value = {"seeds": sorted(both)}
    for name, path, run in zip(("dflash", "eagle3"), args.results, args.runs, strict=True):
        value[name] = side(path, run, both)
        print(name, value[name]["parameters"], "SFT", [round(t, 2) for t in value[name]["sft"]])
        for variant, row in value[name]["variants"].items():
            mean, sd = row["percent_to_continued"]
            taus = " ".join(f"{t:.2f}" for t in row["tau"])
            print(f"  {variant:22} {taus}   {mean:+.1f} ± {sd:.1f} %  {row['wins']}/{len(both)}")
    machine.write("families", value)


if __name__ == "__main__":
    main()
