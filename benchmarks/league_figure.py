"""The figure of docs/objectives.md: what Draft-OPD adds within SFT's decay, a dot a seed.

python benchmarks/league_figure.py
"""

import json
from pathlib import Path

from draft_opd.pipelines.ablation import plot

RESULTS = Path(__file__).parent / "results"
OUT = Path(__file__).parent.parent / "docs" / "league_families.svg"
LINES = {  # label: results file, variant
    "DFlash": ("league_fresh", "dpace"),
    "DFlash, random anchors": ("league_fresh", "dpace_random"),
    "EAGLE-3": ("league_eagle3", "dpace"),
    "DSpark": ("league_dspark", "dpace"),
    "DFlash2": ("league_dflash2", "dpace"),
    "DFlash, temperature 1": ("league_sampled", "dpace"),
}
SEARCH = 20  # seeds up to here chose rates and objectives, so they are no proof


def main() -> None:
    rows = []
    for label, (name, variant) in LINES.items():
        for r in json.loads((RESULTS / f"{name}.json").read_text())["runs"]:
            if r["seed"] > SEARCH and r["variant"] in ("sft", variant):
                shown = "SFT" if r["variant"] == "sft" else label
                rows.append({**r, "variant": shown, "seed": f"{label} {r['seed']}"})
    OUT.write_text(plot(rows, "SFT"))


if __name__ == "__main__":
    main()
