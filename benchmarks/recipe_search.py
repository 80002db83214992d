"""Which objective, anchors and learning rate carry a drafter beyond its SFT plateau?

    python benchmarks/recipe_search.py --work runs/search --seeds 0 1 2 [--only NAME ...]

Every variant starts from the same SFT drafter of its seed and gets the same number of steps,
batches and replayed blocks. τ is exact (hindsight) on prompts that are neither the demo's training
nor its held-out ones. Results go to benchmarks/results/recipe_search.json, one row a run; rows that
are there are not run again.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch

from draft_opd.embedded.problems import problems
from draft_opd.files import write_json
from draft_opd.rollout.collect import collect
from draft_opd.rollout.prompts import Prompt, read_prompts
from draft_opd.target import Target
from draft_opd.training.config import load_recipe
from draft_opd.training.loop import Run

KIND = "opd.objective.kind="
TRAJECTORY = "opd.objective.trajectory_weight="
VARIANTS = {
    "sft_continued": ["sft.anchors=16"],
    "ce_random": [KIND + "cross_entropy", "opd.anchors=random"],
    "ce_replay": [KIND + "cross_entropy"],
    "paper": [KIND + "acceptance_aware"],
    "paper_t0.3": [KIND + "acceptance_aware", "opd.objective.supervision_temperature=0.3"],
    "paper_accepted+ce": [
        KIND + "acceptance_aware", "opd.objective.rejected_weight=0", TRAJECTORY + "1.0",
    ],
    "length": [KIND + "expected_length", TRAJECTORY + "0"],
    "length+0.1ce": [KIND + "expected_length", TRAJECTORY + "0.1"],
    "length+0.3ce": [KIND + "expected_length", TRAJECTORY + "0.3"],
    "length+1ce": [KIND + "expected_length", TRAJECTORY + "1.0"],
    "length+0.3ce_random": [KIND + "expected_length", TRAJECTORY + "0.3", "opd.anchors=random"],
}  # fmt: skip
RATES = {"": [], "@1e-4": ["optim.learning_rate=1e-4"], "@1e-3": ["optim.learning_rate=1e-3"]}


def prepare(work: Path, target: Target, train: int, validation: int) -> None:
    known = {p.messages[0]["content"] for n in ("train", "heldout")
             for p in read_prompts(f"embedded:{n}")}  # fmt: skip
    fresh = [p.question for p in problems(2 * validation, seed=777) if p.question not in known]
    prompts = [
        Prompt(f"v{i}", [{"role": "user", "content": q}])
        for i, q in enumerate(dict.fromkeys(fresh[:validation]))
    ]
    options = {"max_new_tokens": 320, "batch_size": 64}
    collect(target, read_prompts("embedded:train", train), work / "train", **options)
    collect(target, prompts, work / "validation", **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--results", type=Path, default="benchmarks/results/recipe_search.json")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="*", help="variants, with @RATE where wanted")
    parser.add_argument("--tag", default="default", help="names the common settings")
    parser.add_argument("--train", type=int, default=1200)
    parser.add_argument("--validation", type=int, default=400)
    parser.add_argument("common", nargs="*", metavar="KEY=VALUE", help="for both stages")
    parser.add_argument("--sft", nargs="*", default=[], help="KEY=VALUE for the SFT stage")
    parser.add_argument("--opd", nargs="*", default=[], help="KEY=VALUE for what follows")
    args = parser.parse_args()
    target = Target.from_pretrained("embedded")
    prepare(args.work, target, args.train, args.validation)
    data = [
        f"data.trajectories={args.work / 'train'}", f"data.heldout={args.work / 'validation'}",
        f"data.limit={args.train}", "data.heldout_limit=null", *args.common,
    ]  # fmt: skip
    rows = json.loads(args.results.read_text())["runs"] if args.results.exists() else []
    names = args.only if args.only is not None else list(VARIANTS)
    for seed in args.seeds:
        pairs = [*data, f"seed={seed}"]
        start = args.work / args.tag / f"sft-{seed}"
        if not (start / "done").exists():
            recipe = load_recipe("embedded", [*pairs, *args.sft, f"out={start}"], "sft")
            result = Run("sft", recipe, target=target, resume=start.exists()).train()
            (start / "done").write_text(f"{result.tau}\n")
        begin = float((start / "done").read_text())
        print(f"{args.tag} seed {seed}: SFT τ {begin:.3f}", flush=True)
        for full in names:
            name, _, rate = full.partition("@")
            if any((r["tag"], r["variant"], r["seed"]) == (args.tag, full, seed) for r in rows):
                continue
            out = args.work / args.tag / f"{full}-{seed}"
            stage = "sft" if name == "sft_continued" else "opd"
            more = [*VARIANTS[name], *([f"optim.learning_rate={rate}"] if rate else [])]
            tree = [*pairs, *args.opd, *more, f"drafter={start / 'last'}", f"out={out}"]
            recipe = load_recipe("embedded", tree, "opd")
            result = Run(stage, recipe, target=target, resume=out.exists()).train()
            # Another process may have added rows meanwhile.
            rows = json.loads(args.results.read_text())["runs"] if args.results.exists() else []
            rows.append(
                {
                    "tag": args.tag, "variant": full, "seed": seed, "start": begin,
                    "tau": result.tau, "best": result.best_tau, "best_step": result.best_step,
                    "steps": result.step, "supervised": result.supervised,
                    "seconds": round(result.seconds, 1), "common": args.common, "sft": args.sft,
                    "opd": args.opd,
                }
            )  # fmt: skip
            machine = {
                "cpu": platform.processor() or platform.machine(),
                "torch": torch.__version__,
            }
            write_json(args.results, {"machine": machine, "runs": rows})
            print(f"  {full:22s} τ {result.tau:.3f} ({result.tau / begin - 1:+.1%}) "
                  f"{result.seconds:.0f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
