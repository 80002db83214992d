"""README.md of an exported drafter: its target, how to serve it, how it was trained."""

from __future__ import annotations

import json
from pathlib import Path

from draft_opd import __version__
from draft_opd.drafters import Drafter
from draft_opd.utils.errors import UserError
from draft_opd.utils.files import read_json


def model_card(drafter: Drafter, source: str, target: str, serve: str) -> str:
    """Markdown; what is known of the training comes from the run folder around `source`."""
    size = sum(p.numel() for p in drafter.parameters())
    words = "all tokens" if drafter.vocabulary is None else f"{len(drafter.vocabulary):,} tokens"
    lines = [
        "---",
        f"base_model: {target}",
        "tags: [speculative-decoding, draft-opd]",
        "---",
        "",
        f"# {drafter.family} drafter for {target}",
        "",
        f"A speculative-decoding drafter of {size:,} parameters: {drafter.draft_length} tokens a "
        f"round from {words}, on the outputs of target layers {list(drafter.target_layers)} "
        f"(0-based). Made with draft-opd {__version__}.",
        "",
        "## Serve",
        "",
        "```sh",
        serve,
        "```",
        "",
        "The text served is the target's own; only its speed changes.",
        "",
        *_training(Path(source)),
    ]
    return "\n".join(lines)


def _training(source: Path) -> list[str]:
    run = source.parent
    try:
        recipe = (run / "recipe.yaml").read_text(encoding="utf-8")
        rows = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
        stage = read_json(run / "run.json")["stage"]
    except (UserError, OSError, ValueError, KeyError):
        return ["## Training", "", "Not known: the drafter was not in a run folder.", ""]
    taus = [(r["step"], r["tau"]) for r in rows if "tau" in r]
    if source.name == "best" and taus:
        # `best` is the first checkpoint that reached the highest held-out τ.
        last = taus.index(max(taus, key=lambda row: row[1])) + 1
        taus = taus[:last]
    return [
        "## Training",
        "",
        f"Stage `{stage}`, this recipe:",
        "",
        "```yaml",
        recipe.rstrip(),
        "```",
        "",
        "τ (tokens a round, bonus token included) on held-out trajectories:",
        "",
        "| step | τ |",
        "|---|---|",
        *(f"| {step} | {tau:.3f} |" for step, tau in taus),
        "",
    ]
