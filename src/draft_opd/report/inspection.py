"""`inspect`: what a path is, in one screen."""

from __future__ import annotations

from pathlib import Path

from rich.text import Text

from draft_opd.data.collect import summary
from draft_opd.data.trajectory import Trajectory, read_trajectories
from draft_opd.drafters import Drafter
from draft_opd.drafters.registry import family_of
from draft_opd.models.hub import EMBEDDED, find_folder, read_config, resolve_path
from draft_opd.models.loading import is_target_folder
from draft_opd.models.target import Target
from draft_opd.training.run_folder import is_run, read_history
from draft_opd.utils.console import facts
from draft_opd.utils.errors import UserError
from draft_opd.utils.files import read_json

# Keys of a drafter's config that say how it drafts.
SHAPE = (
    "block_size",
    "sample_from_anchor",
    "markov_head_type",
    "markov_rank",
    "selector_top_k",
    "selector_rank",
    "output_multiplier",
    "final_logit_softcapping",
)


def describe(path: str, target: str | None = None, sample: int = 0) -> tuple[dict, list]:
    """Returns (what `--json` prints, what a person sees)."""
    place = Path(resolve_path(path))
    if place.is_file():
        return _trajectories(place, target, sample)
    if is_run(place):
        return _run(place, target, sample)
    if (place / "trajectories.jsonl").exists():
        return _trajectories(place / "trajectories.jsonl", target, sample)
    if (place / "best").is_dir() or (place / "summary.json").exists():
        return _demo(place)
    folder = find_folder(place, "path")
    if family_of(read_config(folder, "model")):
        value = _drafter(folder)
    elif is_target_folder(folder):
        model = Target.from_pretrained(str(folder), device="cpu")
        value = {"kind": "target", "path": str(folder.resolve()), **model.describe()}
        if path == EMBEDDED:
            value["prompts"] = f"{EMBEDDED}:train and {EMBEDDED}:heldout"
    else:
        raise UserError(f"'{path}' is neither a drafter, a target, trajectories nor a run folder")
    return value, [facts(f"{value['kind']}: {path}", value)]


def _drafter(folder: Path) -> dict:
    drafter = Drafter.from_pretrained(str(folder), device="cpu")
    config = drafter.config_dict()
    options = {**config, **(config.get("dflash_config") or {})}
    return {
        "kind": "drafter",
        "path": str(folder),
        "family": drafter.family,
        "layout": drafter.layout,
        "parameters": sum(p.numel() for p in drafter.parameters()),
        "draft_length": drafter.draft_length,
        "target_layers": list(drafter.target_layers),
        **{k: options[k] for k in SHAPE if options.get(k) is not None},
        "confidence_head": drafter.has_confidence,
        "export_formats": list(drafter.formats),
    }


def _demo(place: Path) -> tuple[dict, list]:
    path = place / "summary.json"
    if not path.exists():
        raise UserError(f"'{place}' is a demo that has not ended: it has no summary.json")
    value = {"kind": "demo", "path": str(place), **read_json(path)}
    return value, [facts(f"demo: {place}", value)]


def _run(place: Path, target: str | None, sample: int) -> tuple[dict, list]:
    run = read_history(place)
    recipe, taus = run.recipe, run.taus
    value = {
        "kind": "run",
        "path": str(place),
        "stage": run.about["stage"],
        "target": recipe["target"],
        "drafter_parameters": run.about["drafter_parameters"],
        "steps": recipe["steps"],
        "evaluations": len(taus),
        "last_tau": taus[-1][1] if taus else None,
        "best_tau": max(t for _, t in taus) if taus else None,
        "step": max((m["step"] for m in run.metrics), default=0),
        "skipped_steps": sum("skipped" in m for m in run.metrics),
        "checkpoints": [n for n in ("best", "last") if (place / n).is_dir()]
        + sorted(str(p.relative_to(place)) for p in place.glob("checkpoints/step-*")),
    }
    shown = [facts(f"run: {place}", value)]
    try:
        rows = read_trajectories(recipe["data"]["trajectories"])
        value["sample"], text = _sample(rows, target or recipe["target"], sample)
        shown.append(text)
    except UserError as error:
        shown.append(Text(f"no sample: {error}"))
    return value, shown


def _trajectories(path: Path, target: str | None, sample: int) -> tuple[dict, list]:
    value = summary(path)
    rows = read_trajectories(path)
    about, asked = _collected(path.with_name("collect.json")), target is not None
    target = target or about.get("target")
    if about:
        ended = about.get("ended")
        value["collected"] = (
            f"all: {ended['answered']} of {ended['asked']} prompts have an answer"
            if ended
            else "not to the end: the same command goes on"
        )
    try:
        value["sample"], text = _sample(rows, target, sample)
    except UserError:
        if asked:
            raise
        value["sample"], text = _sample(rows, None, sample)  # its target has moved: ids, then
    shown = {k: v for k, v in value.items() if k != "sample"}
    return value, [facts(f"trajectories: {path}", shown), text]


def _collected(path: Path) -> dict:
    """What `collect` wrote beside trajectories; nothing where it did not, or that is damaged."""
    try:
        found = read_json(path)
    except UserError:
        return {}
    return found if isinstance(found, dict) else {}


def _sample(rows: list[Trajectory], target: str | None, index: int) -> tuple[dict, Text]:
    """One trajectory: the prompt dim (no loss), the response green (loss), stop token included."""
    if index >= len(rows):
        raise UserError(f"--sample {index}: there are {len(rows)} trajectories")
    t = rows[index]
    mask = {"id": t.id, "unsupervised": len(t.prompt_ids), "supervised": len(t.response_ids)}
    shown = Text(f"\nsample {index} (id {t.id}): ")
    shown.append(f"{len(t.prompt_ids)} tokens without loss", style="dim")
    shown.append(", ")
    shown.append(f"{len(t.response_ids)} tokens with loss", style="green")
    if target is None:
        shown.append("\n(--target T shows them as text)\n")
        shown.append(str(t.prompt_ids), style="dim").append(str(t.response_ids), style="green")
        return mask, shown
    decode = _tokenizer(target).decode
    mask["prompt"], mask["response"] = decode(t.prompt_ids), decode(t.response_ids)
    shown.append("\n⟨prompt⟩ ").append(mask["prompt"], style="dim")
    shown.append("\n⟨response⟩ ").append(mask["response"], style="green")
    return mask, shown


def _tokenizer(target: str):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(resolve_path(target))
    except Exception as error:
        raise UserError(f"the tokenizer of '{target}' cannot be loaded ({type(error).__name__})") from error
