"""The report: one HTML file that opens offline, and each of its plots as SVG and PNG."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml
from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure

import draft_opd
from draft_opd.evaluation.measure import BASELINE
from draft_opd.evaluation.result import EvaluationResult, SideResult, TaskResult
from draft_opd.report import charts
from draft_opd.report.format import number, spread, times
from draft_opd.report.plot_style import png, svg
from draft_opd.report.tables import (
    Table,
    batch_table,
    best_length,
    comparison_table,
    elsewhere_table,
    group_tables,
    length_table,
    round_table,
    served_table,
    task_table,
)
from draft_opd.training.run_folder import History
from draft_opd.utils.files import make_folder, write_bytes, write_text


@dataclass
class Report:
    """What a page is made of; every part may be missing.

    samples: of `Evaluation.samples`. training: the runs behind
    each drafter, {name: oldest first}. analyses: {name: result of `analyse`}. tiles and tables: a
    headline of the caller's own.
    """

    title: str
    lead: str = ""
    evaluation: EvaluationResult | None = None
    samples: list[dict] = field(default_factory=list)
    training: dict[str, list[History]] = field(default_factory=dict)
    analyses: dict[str, dict] = field(default_factory=dict)
    tiles: list[dict] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)

    def write(self, folder: Path) -> Path:
        """Writes report.html and plots/NAME.svg, plots/NAME.png; returns the page's path."""
        plots = make_folder(make_folder(folder) / "plots")

        def plot(name: str, figure: Figure, title: str, text: str) -> dict:
            write_text(plots / f"{name}.svg", svg(figure))
            write_bytes(plots / f"{name}.png", png(figure))
            return {"svg": svg(figure, inline=True), "title": title, "text": text}

        sections = [s for s in self._sections(plot) if s["tables"] or s["plots"]]
        loader = PackageLoader("draft_opd.report", "")
        page = Environment(loader=loader, autoescape=True, trim_blocks=False)
        html = page.get_template("template.html.j2").render(
            title=self.title,
            lead=self.lead,
            tiles=self.tiles or _tiles(self.evaluation),
            sections=sections,
            samples=self.samples,
            shown=best_side(self.evaluation.every_side()).side if self.evaluation else "",
            configurations=self._configurations(),
            version=draft_opd.__version__,
        )
        path = folder / "report.html"
        write_text(path, html)
        return path

    def _sections(self, plot) -> list[dict]:
        e = self.evaluation
        found = [_section("Summary", tables=self.tables)]
        if e:
            found += _evaluation(e, plot)
        if any(run.taus for runs in self.training.values() for run in runs):
            found.append(self._training(plot))
        if e:
            found += [*_lengths(e, plot), *_concurrency(e, plot)]
        if self.analyses:
            found.append(_analysis(self.analyses, plot))
        return found

    def _training(self, plot) -> dict:
        text = "On held-out text of the target; each branch goes on from the drafter before it."
        plots = [plot("training", charts.training(self.training), "Held-out τ over steps", text)]
        for i, (name, runs) in enumerate(self.training.items()):
            figure = charts.halves(runs[-1]) if runs else None
            if figure:
                plots.append(
                    plot(
                        f"halves-{i}",
                        figure,
                        f"Accepted lengths while {name} trains",
                        "Share of the rounds of its traces that accepted so many tokens; the last "
                        "one is a full accept.",
                    )
                )
        return _section("Training", plots=plots)

    def _configurations(self) -> list[dict]:
        found = []
        if self.evaluation:
            found.append({"title": "evaluation", "text": _yaml(self.evaluation.settings())})
        seen = {run.path: run for runs in self.training.values() for run in runs}
        for run in seen.values():
            found.append({"title": f"recipe of {run.path}", "text": _yaml(run.recipe)})
            found.append({"title": f"how {run.path} was made", "text": _yaml(run.about)})
        return found


def best_side(sides: Sequence[SideResult], key: str = "tau") -> SideResult:
    """The one with the highest τ, or `speedup`."""
    return max(sides, key=lambda s: getattr(s.mean, key) or 0)


def _section(title: str, text: str = "", tables: Sequence = (), plots: Sequence = ()) -> dict:
    return {"title": title, "text": text, "tables": list(tables), "plots": list(plots)}


def _tiles(evaluation: EvaluationResult | None) -> list[dict]:
    """Headline figures of the side with the highest τ."""
    if not evaluation:
        return []
    sides = evaluation.every_side()
    tiles = []
    for key, label, show in (("tau", "τ, tokens a round", number), ("speedup", "speed-up", times)):
        best = best_side(sides, key)
        value = getattr(best.mean, key)
        if value is None:
            continue
        several = len(best.tasks) > 1
        where = f"{best.side}, mean of {len(best.tasks)} tasks" if several else best.side
        ends = None if several else getattr(best.tasks[0], f"{key}_interval")
        tiles.append(_tile(show(value), label, where, ends))
    every = [t.lossless for s in sides for t in s.tasks]
    if of := sum(x.of for x in every):
        same = sum(x.matched or 0 for x in every)
        how = "letter for letter" if evaluation.server else "token for token"
        tiles.append(_tile(f"{same}/{of}", "responses with the same text", f"as the target alone, {how}"))
    return tiles


def _tile(value: str, label: str, note: str, ends: Sequence[float] | None = None) -> dict:
    return {"value": value, "label": f"{label} ({spread(ends)})" if ends else label, "note": note}


def _evaluation(e: EvaluationResult, plot) -> list[dict]:
    sides = e.every_side()
    tasks = [t for s in sides for t in s.tasks]
    tables = [task_table(sides)]
    if e.comparison:
        tables.append(comparison_table(e.comparison))
    text = "Intervals are bootstrapped over prompts; speeds are decoding only, without prefill."
    if e.server:
        sources = {t.tau_from for t in e.tasks if t.tau_from}
        text = "Speeds are of the first level below, prefill and network included. τ: "
        text += ("; ".join(sorted(sources)) or "the server counts none") + "."
    if any(t.regret for t in tasks):
        text += (
            " In 16 bit near-ties may fall either way: 'beyond rounding' counts tokens that are "
            "further from the target's choice than the type's rounding allows."
        )
    if held := [t.memory_bytes for t in tasks if t.memory_bytes]:
        target, drafter, peak = (
            max(getattr(m, part) or 0 for m in held) / 1e6 for part in ("target", "drafter", "peak")
        )
        text += f" Weights: target {target:.1f} MB, drafter {drafter:.1f} MB"
        text += f"; at most {peak:.0f} MB held." if peak else "."
    found = [_section("Tasks", text, tables)]
    plots, positions = [], {s.side: _positions(s.tasks) for s in sides}
    if any(positions.values()):
        what = (
            "Of the rounds that drafted offset k, the share that accepted it. Where drafts end early "
            "(a confidence, an automatic length) these are the surer ones."
        )
        plots.append(plot("positions", charts.by_position(positions), "Acceptance by position", what))
    if all(t.accepted_histogram is not None for t in tasks):
        counts = {s.side: _summed([t.accepted_histogram or [] for t in s.tasks]) for s in sides}
        what = "Over all tasks; where drafts have one length, the last bar is a full accept."
        plots.append(plot("histogram", charts.histogram(counts), "Accepted tokens a round", what))
    found.append(_section("Where drafts are accepted", tables=group_tables(sides), plots=plots))
    if timed := round_table(sides):
        found.append(_section("Milliseconds a round", tables=[timed]))
    return found


def _summed(rows: Sequence[Sequence[float]]) -> list[float]:
    width = max(map(len, rows))
    return [sum(r[k] for r in rows if k < len(r)) for k in range(width)]


def _positions(tasks: Sequence[TaskResult]) -> list[float]:
    """Acceptance by position over all tasks: their rounds together."""
    weighted = [[a * t.rounds for a in t.acceptance_by_position] for t in tasks if t.rounds]
    total = sum(t.rounds or 0 for t in tasks)
    return [n / total for n in _summed(weighted)] if weighted else []


def _lengths(e: EvaluationResult, plot) -> list[dict]:
    found = []
    for i, advice in enumerate(e.draft_lengths):
        how = "drawn given the text" if e.temperature else "exact"
        text = (
            f"On this machine {best_length(advice)}. τ at each "
            f"length is {how}, by hindsight on {advice.responses} responses; "
            "a round's cost is timed in the decode loop. For other hardware: what memory bandwidth "
            f"and matrix rate allow in 16 bit, {advice.context} tokens of context a request, "
            "and nothing else costing time, so an upper bound."
        )
        tables = [replace(length_table(advice), title="")]
        if advice.elsewhere:
            tables.append(elsewhere_table(advice))
        figure = charts.draft_lengths(advice)
        plots = [plot(f"draft-lengths-{i}", figure, "This machine", "Speed-up by draft length.")]
        for place in [x.hardware for x in advice.elsewhere[:1]]:
            figure = charts.elsewhere(advice, place)
            what = "What its bandwidth and matrix rate allow, by requests at a time."
            plots.append(plot(f"elsewhere-{i}", figure, place, what))
        found.append(_section(f"Which draft length: {advice.drafter}", text, tables, plots))
    return found


def _concurrency(e: EvaluationResult, plot) -> list[dict]:
    sections = []

    def add(table: Table, text: str, points: Sequence[tuple[str, int, float]]) -> None:
        figure = plot(
            f"concurrency-{len(sections)}",
            charts.concurrency(points, BASELINE),
            "Throughput",
            "All requests together, prefill included.",
        )
        sections.append(_section(table.title, text, [replace(table, title="")], [figure]))

    if e.concurrency:
        text = "Prompts of every task in turn; batches begin together and are full."
        points = [(r.side, r.batch, r.tokens_per_second) for r in e.concurrency]
        add(batch_table(e.concurrency), text, points)
    for task in e.tasks:
        points = [
            (name, level.in_flight, rate.tokens_per_second)
            for level in task.concurrency
            for name, rate in ((BASELINE, level.target), ("served with the drafter", level.speculative))
            if rate
        ]
        if points:
            text = "Requests the server had at a time; at the end of a level they are fewer."
            add(served_table(task), text, points)
    return sections


def _analysis(analyses: dict[str, dict], plot) -> dict:
    shares = [
        [name, number(a["tau"]), *(f"{100 * x:.1f} %" for x in a["share"].values())]
        for name, a in analyses.items()
    ]
    columns = ["replayed draft tokens", "τ", "accepted", "first rejected", "suffix behind it"]
    plots = [
        plot(
            "mismatch",
            charts.mismatch(analyses),
            "Mismatch in the states the drafter visits",
            "Mean KL between target p and drafter q. trajectory: every offset scored on the text, "
            "as teacher forcing sees it; the others in the drafted states."
            + "".join(
                f" KL(p‖q) of {name} is over the {a['support']} tokens that it chooses among."
                for name, a in analyses.items()
                if a.get("support")
            ),
        ),
        plot("anchors", charts.anchors(analyses), "Where rounds begin", "Rounds by tenth of the response."),
    ]
    sure = {name: a["confidence"] for name, a in analyses.items() if a.get("confidence")}
    if sure:
        errors = (f"{name} {100 * found['error']:.1f} %" for name, found in sure.items())
        what = (
            "The chance that a drafted token is accepted: what the drafter said against what came, by tenths "
            f"of what was said. Expected calibration error: {', '.join(errors)}."
        )
        plots.append(plot("confidence", charts.confidence(sure), "Confidence", what))
    misread = " ".join(f"{name}: {line}." for name, a in analyses.items() for line in a.get("misread", ()))
    text = f"Is the drafter read rightly? {misread}" if misread else ""
    return _section("Where the drafter fails", text, [Table("", columns, shares)], plots)


def _yaml(value: dict) -> str:
    plain = json.loads(json.dumps(value))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
