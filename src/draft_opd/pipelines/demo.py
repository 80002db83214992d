"""The whole pipeline on the shipped target: SFT, SFT continued against Draft-OPD, evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from draft_opd.data.collect import collect
from draft_opd.data.prompts import Prompt, read_prompts
from draft_opd.data.tasks import Task
from draft_opd.data.trajectory import drawn, read_trajectories
from draft_opd.decoding.generate import speculate
from draft_opd.decoding.rounds import Round, tau
from draft_opd.drafters import FAMILIES, Drafter
from draft_opd.evaluation.analysis import analyse
from draft_opd.evaluation.measure import sides_of
from draft_opd.evaluation.run import Evaluation
from draft_opd.evaluation.statistics import difference
from draft_opd.models.hub import EMBEDDED
from draft_opd.models.target import Target
from draft_opd.report.format import spread, times
from draft_opd.report.page import Report
from draft_opd.report.tables import Table
from draft_opd.training.config import load_recipe
from draft_opd.training.run_folder import lineage
from draft_opd.training.trainer import Run
from draft_opd.utils.console import Screen, table
from draft_opd.utils.errors import UserError
from draft_opd.utils.files import make_folder, read_json, write_json
from draft_opd.utils.machine import tune_num_threads

MAX_NEW_TOKENS = 320
ANALYSED = 32  # held-out texts that the analyses look at
SPEED_PROMPTS = 8  # enough to see a ratio; the rest of the prompts are decoded in batches
LABELS = {
    "untrained": "untrained",
    "sft": "SFT, constant rate",
    "sft_continued": "SFT, continued",
    "draft_opd": "Draft-OPD",
}


# What the stages took on one machine, in seconds: only their proportions count.
USUAL = {"collect": 212, "sft": 458, "sft_continued": 187, "draft_opd": 190, "evaluate": 237}
Left = Callable[[float], str]  # part of a stage that is done -> a note


class _Clock:
    """Seconds by stage, and how long the rest will take at the pace so far.

    `say` gets one estimate of the whole, once a fortieth of the work is done.
    """

    def __init__(self, say: Callable[[str], None], now: Callable[[], float] = time.perf_counter):
        self.seconds: dict[str, float] = {}
        self._say, self._now, self._began, self._told = say, now, now(), False
        self._done = dict.fromkeys(USUAL, 0.0)
        self._first: dict[str, float] = {}  # part of a stage that an earlier try had done

    @contextmanager
    def stage(self, name: str):
        began = self._now()
        yield
        self.seconds[name] = round(self._now() - began, 1)
        self.left(name, 1.0)

    def left(self, stage: str, part: float) -> str:
        """A note for a progress line: `part` of that stage is done."""
        self._first.setdefault(stage, part)
        self._done[stage] = part
        worked = sum(USUAL[s] * (self._done[s] - first) for s, first in self._first.items())
        rest = sum(USUAL[s] * (1 - done) for s, done in self._done.items())
        if worked < sum(USUAL.values()) / 40:
            return ""
        spent = self._now() - self._began
        seconds = rest * spent / worked
        if not self._told:
            self._told = True
            self._say(f"on this machine the demo will take about {_minutes(spent + seconds)}")
        return f"about {_minutes(seconds)} left"


def _minutes(seconds: float) -> str:
    count = max(1, round(seconds / 60))
    return f"{count} minute{'s' * (count > 1)}"


def run_demo(
    out: Path,
    family: str,
    seed: int,
    screen: Screen,
    overrides: list[str] | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> dict:
    """Writes everything into `out` and returns what `summary.json` holds.

    `overrides` change the embedded recipe, KEY=VALUE (tests make it small that way). A demo that
    was killed goes on where it stopped, with the same family and seed.
    """
    if family not in FAMILIES:
        raise UserError(f"--family {family}: choose one of {', '.join(FAMILIES)}")
    _take_up(out, {"family": family, "seed": seed, "overrides": overrides or []})
    clock = _Clock(screen.say)
    target = Target.from_pretrained(EMBEDDED)
    if target.device.type == "cpu":
        sample = torch.zeros(8, 256, dtype=torch.long)
        threads = tune_num_threads(lambda: target.trajectories(sample))
        screen.say(f"{threads} CPU thread{'s' * (threads > 1)}: the fastest here and now")

    def recipe(stage: str, name: str, data: str, *more: str):
        pairs = [
            f"seed={seed}",
            f"data.trajectories={out / 'data' / data}",
            f"data.heldout={out / 'data' / 'heldout'}",
            f"out={out / name}",
        ]
        return load_recipe(f"{EMBEDDED}:{family}", [*pairs, *more, *(overrides or [])], stage)

    sft = recipe("sft", "sft", "train")
    opd = recipe("opd", "draft_opd", "fresh", f"drafter={out / 'sft' / 'last'}")
    # The control: the SFT loss with Draft-OPD's text, steps, batches, schedule and number of blocks.
    control = opd.model_copy(
        update={
            "out": str(out / "sft_continued"),
            "sft": sft.sft.model_copy(update={"anchors": opd.opd.max_anchors}),
        }
    )
    heldout = read_prompts(f"{EMBEDDED}:heldout", sft.data.heldout_limit)
    asked = {**_train_prompts(sft.data.limit, opd.data.limit), "heldout": heldout}
    every, before = sum(map(len, asked.values())), 0
    with clock.stage("collect"):
        for part, prompts in asked.items():
            with screen.progress(f"collect {part}", len(prompts)) as update:

                def show(done: int, _: int, tokens: int, update=update, before=before) -> None:
                    left = clock.left("collect", (before + done) / every)
                    update(done, f"{tokens} tokens  {left}")

                collect(
                    target,
                    prompts,
                    out / "data" / part,
                    max_new_tokens=max_new_tokens,
                    batch_size=64,
                    progress=show,
                )
            before += len(prompts)

    steps, supervised, run = {}, {}, None
    for name, stage, plan in (
        ("sft", "sft", sft),
        ("sft_continued", "sft", control),
        ("draft_opd", "opd", opd),
    ):
        with clock.stage(name), screen.progress(LABELS[name], plan.steps) as update:
            resume = Path(plan.out).exists()
            left = partial(clock.left, name)
            run = Run(
                stage,
                plan,
                target=target,
                after=run,
                resume=resume,
                on_metrics=_show(update, left, plan.steps),
            )
            if name == "sft" and run.progress.step == 0:
                run.drafter.save_pretrained(out / "untrained")
            result = run.train()
        steps[name], supervised[name] = result.step, result.supervised

    with clock.stage("evaluate"):
        left = partial(clock.left, "evaluate")
        value, parts = _measure(target, out, heldout, max_new_tokens, screen, left)
    summary = {
        **value,
        "steps": steps,
        "seconds": clock.seconds,
        "seed": seed,
        "family": family,
        "threads": torch.get_num_threads(),
    }
    write_json(out / "summary.json", summary)
    report = _report(summary, supervised, parts, len(heldout)).write(out)
    _present(summary, report, screen)
    return summary


def _train_prompts(first: int, fresh: int) -> dict[str, list[Prompt]]:
    """Those of SFT, and as many others as the stages behind it take: {folder: prompts}."""
    prompts = read_prompts(f"{EMBEDDED}:train", first + fresh)
    return {"train": prompts[:first], "fresh": prompts[first:]}


def _take_up(out: Path, asked: dict) -> None:
    """Makes the folder, or makes sure that it holds an unfinished demo of the same kind."""
    about = out / "demo.json"
    if (out / "summary.json").exists():
        raise UserError(
            f"'{out}' holds a finished demo, with its report.html: choose a new folder or remove it"
        )
    if not about.exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"'{out}' exists and is not empty: choose a new folder or remove it")
        write_json(make_folder(out) / about.name, asked)
    elif read_json(about) != asked:
        raise UserError(
            f"'{out}' holds an unfinished demo of another family or seed: choose a new folder or remove it"
        )


def _show(update, left: Left, steps: int):
    last = {"loss": "", "tau": ""}

    def show(line: dict) -> None:
        if "loss" in line:
            last["loss"] = f"loss {line['loss']:.3f}"
        if "tau" in line:
            last["tau"] = f"τ {line['tau']:.2f}"
        update(line["step"], "  ".join(filter(None, [*last.values(), left(line["step"] / steps)])))

    return show


def _measure(
    target: Target,
    out: Path,
    heldout: list[Prompt],
    max_new_tokens: int,
    screen: Screen,
    left: Left,
) -> tuple[dict, dict]:
    """Real decoding of every held-out prompt with each drafter, and speed on some of them."""
    alone = {t.id: t for t in read_trajectories(out / "data" / "heldout")}
    ids = [alone[p.id].prompt_ids for p in heldout]
    traces: dict[str, list[list[Round]]] = {}
    matched = of = 0
    folders = {n: out / n / "last" for n in ("sft", "sft_continued", "draft_opd")}
    drafters = {
        name: Drafter.from_pretrained(str(folder), device=target.device)
        for name, folder in {"untrained": out / "untrained", **folders}.items()
    }
    for number, (name, drafter) in enumerate(drafters.items()):
        traces[name] = []
        with screen.progress(f"decode, {LABELS[name]}", len(ids)) as update:
            for start in range(0, len(ids), 64):
                made = speculate(target, drafter, ids[start : start + 64], max_new_tokens=max_new_tokens)
                for prompt, g in zip(heldout[start : start + 64], made, strict=True):
                    matched += g.token_ids == alone[prompt.id].response_ids
                    of += 1
                    traces[name].append(g.rounds)
                done = min(start + 64, len(ids))
                # The speed of some prompts and the analyses come behind: about as long as one.
                update(done, left((number + done / len(ids)) / (len(drafters) + 1)))
    sides = sides_of(
        {LABELS[n]: (str(folder), drafters[n]) for n, folder in folders.items()},
        baseline=LABELS["sft_continued"],
    )
    timed = Evaluation(
        target, sides, [Task(EMBEDDED, heldout[:SPEED_PROMPTS])], max_new_tokens=max_new_tokens
    )
    with screen.progress("speed, one prompt at a time", min(SPEED_PROMPTS, len(ids))) as update:
        timed.say = lambda _, done, __: update(done)
        timed.run()
    evaluation = timed.report()
    speed = {n: side.mean.speedup for n, side in zip(folders, evaluation.sides, strict=True)}
    analyses = {
        LABELS[name]: analyse(target, drafters[name], drawn(list(alone.values()), ANALYSED))
        for name in ("sft_continued", "draft_opd")
    }
    taus = {name: tau(r for rounds in rows for r in rounds) for name, rows in traces.items()}
    value = {
        "tau": taus,
        "tau_difference": {
            "draft_opd - sft_continued": taus["draft_opd"] - taus["sft_continued"],
            "interval": list(difference(traces["draft_opd"], traces["sft_continued"]) or ()),
        },
        "gain": taus["draft_opd"] / taus["sft_continued"] - 1,
        "lossless": {"matched": matched, "of": of},
        "speedup": speed,
    }
    timed.save(out / "evaluation", evaluation)
    return value, {
        "evaluation": evaluation,
        "samples": timed.samples,
        "training": {LABELS[n]: lineage(str(folder)) for n, folder in folders.items()},
        "analyses": analyses,
    }


def _report(summary: dict, supervised: dict, parts: dict, prompts: int) -> Report:
    same, gain = summary["lossless"], summary["gain"]
    between = spread(summary["tau_difference"]["interval"], "+.2f")
    rows = [
        [
            LABELS[name],
            f"{t:.3f}",
            summary["steps"].get(name, 0),
            f"{supervised.get(name, 0):,}",
            times(summary["speedup"].get(name)),
        ]
        for name, t in summary["tau"].items()
    ]
    columns = ["drafter", "τ", "steps", "supervised tokens", "speed-up"]
    title = f"{prompts} held-out prompts, greedy; speed on {min(prompts, SPEED_PROMPTS)} of them"
    return Report(
        "Draft-OPD demo",
        f"A {summary['family']} drafter for the shipped target, trained by SFT at a constant rate; "
        "from there, while the rate decays, once by more SFT and once by Draft-OPD, with equal fresh text, "
        f"steps, batches, schedule and draft blocks. Seed {summary['seed']}.",
        tiles=[
            {
                "value": f"{100 * gain:+.1f} %",
                "label": "τ, Draft-OPD against continued SFT",
                "note": f"Δτ {between}, paired over {prompts} prompts",
            },
            {
                "value": f"{summary['tau']['draft_opd']:.2f}",
                "label": "τ, tokens a round",
                "note": f"{summary['tau']['sft_continued']:.2f} with continued SFT",
            },
            {
                "value": times(summary["speedup"]["draft_opd"]),
                "label": "speed-up",
                "note": "against the target alone, on this machine",
            },
            {
                "value": f"{same['matched']}/{same['of']}",
                "label": "decodings with the same text",
                "note": "every held-out prompt, with every drafter",
            },
        ],
        tables=[Table(title, columns, rows)],
        **parts,
    )


def _present(summary: dict, report: Path, screen: Screen) -> None:
    rows = [
        [
            LABELS[n],
            t,
            summary["steps"].get(n, 0),
            f"{summary['speedup'][n]:.2f}×" if n in summary["speedup"] else "",
        ]
        for n, t in summary["tau"].items()
    ]
    same = summary["lossless"]
    screen.result(
        summary,
        table("", ["drafter", "τ", "steps", "speed-up"], rows),
        f"Draft-OPD against continued SFT: {100 * summary['gain']:+.1f} % τ; "
        f"same text as the target alone: {same['matched']}/{same['of']}",
        f"Report: {report}",
    )
