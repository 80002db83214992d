"""The report: one HTML file that opens offline, and each of its plots as SVG and PNG."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure

import draft_opd
from draft_opd.evaluation.measure import BASELINE
from draft_opd.report import charts
from draft_opd.report.format import number, same_text, spread, times
from draft_opd.report.plots import png, svg
from draft_opd.training.run_folder import History
from draft_opd.utils.files import make_folder, write_bytes, write_text

GROUPS = {
    "by_context": "τ by context length (tokens before the round)",
    "by_turn": "τ by turn",
    "by_part": "τ by part",
}


@dataclass
class Report:
    """What a page is made of; every part may be missing.

    evaluation: what eval.json holds. samples: of `Evaluation.samples`. training: the runs behind
    each drafter, {name: oldest first}. analyses: {name: result of `analyse`}. tiles and tables: a
    headline of the caller's own.
    """

    title: str
    lead: str = ""
    evaluation: dict | None = None
    samples: list[dict] = field(default_factory=list)
    training: dict[str, list[History]] = field(default_factory=dict)
    analyses: dict[str, dict] = field(default_factory=dict)
    tiles: list[dict] = field(default_factory=list)
    tables: list[dict] = field(default_factory=list)

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
            shown=best_side(sides_in(self.evaluation))["side"] if self.evaluation else "",
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
                        f"halves-{i}", figure, f"Accepted lengths while {name} trains",
                        "Share of the rounds of its traces that accepted so many tokens; the last "
                        "one is a full accept.",
                    )
                )  # fmt: skip
        return _section("Training", plots=plots)

    def _configurations(self) -> list[dict]:
        found = []
        if self.evaluation:
            kept = {
                k: v
                for k, v in self.evaluation.items()
                if k not in ("tasks", "mean", "sides", "comparison", "draft_lengths", "concurrency")
            }
            found.append({"title": "evaluation", "text": _yaml(kept)})
        seen = {run.path: run for runs in self.training.values() for run in runs}
        for run in seen.values():
            found.append({"title": f"recipe of {run.path}", "text": _yaml(run.recipe)})
            found.append({"title": f"how {run.path} was made", "text": _yaml(run.about)})
        return found


def sides_in(evaluation: dict) -> list[dict]:
    """The sides of an eval.json, one or many."""
    alone = {**evaluation, "side": evaluation["drafter"] or evaluation.get("server") or "served"}
    return evaluation.get("sides") or [alone]


def best_side(sides: Sequence[dict], key: str = "tau") -> dict:
    """The one with the highest τ, or `speedup`."""
    return max(sides, key=lambda s: s["mean"][key] or 0)


def _section(title: str, text: str = "", tables: Sequence = (), plots: Sequence = ()) -> dict:
    return {"title": title, "text": text, "tables": list(tables), "plots": list(plots)}


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence]) -> dict:
    return {"title": title, "columns": columns, "rows": rows}


def _tiles(evaluation: dict | None) -> list[dict]:
    """Headline figures of the side with the highest τ."""
    if not evaluation:
        return []
    sides = sides_in(evaluation)
    tiles = []
    for key, label, show in (("tau", "τ, tokens a round", number), ("speedup", "speed-up", times)):
        best = best_side(sides, key)
        if best["mean"][key] is None:
            continue
        tasks = best["tasks"]
        where = f"{best['side']}, mean of {len(tasks)} tasks" if len(tasks) > 1 else best["side"]
        only = tasks[0] if len(tasks) == 1 else {}
        tiles.append(_tile(show(best["mean"][key]), label, where, only, f"{key}_interval"))
    every = [t["lossless"] for s in sides for t in s["tasks"]]
    if of := sum(x["of"] for x in every):
        same = sum(x["matched"] or 0 for x in every)
        how = "letter for letter" if evaluation.get("server") else "token for token"
        tiles.append(_tile(f"{same}/{of}", "responses with the same text",
                           f"as the target alone, {how}"))  # fmt: skip
    return tiles


def _tile(value: str, label: str, note: str = "", task: dict | None = None, key: str = "") -> dict:
    ends = (task or {}).get(key)
    return {"value": value, "label": f"{label} ({spread(ends)})" if ends else label, "note": note}


def _evaluation(e: dict, plot) -> list[dict]:
    sides = sides_in(e)
    many = len(sides) > 1
    rows = [
        [*([s["side"]] if many else []), t["task"], t["prompts"], f"{t['tokens']:,}",
         number(t["tau"]), spread(t.get("tau_interval")), same_text(t),
         number(t["tokens_per_second"]["target"], 1),
         number(t["tokens_per_second"]["speculative"], 1), times(t["speedup"]),
         spread(t.get("speedup_interval"))]
        for s in sides for t in s["tasks"]
    ]  # fmt: skip
    columns = [*(["drafter"] if many else []), "task", "prompts", "tokens", "τ", "95 %",
               "same text", "target, tok/s", "tok/s", "speed-up", "95 %"]  # fmt: skip
    tables = [_table("", columns, rows)]
    if e.get("comparison"):
        tables.append(_table("Differences, paired by prompt", *comparison_rows(e["comparison"])))
    text = "Intervals are bootstrapped over prompts; speeds are decoding only, without prefill."
    if e.get("server"):
        told = {t["tau_from"] for t in e["tasks"] if t["tau_from"]}
        text = "Speeds are of the first level below, prefill and network included. τ: "
        text += ("; ".join(sorted(told)) or "the server counts none") + "."
    if any(t.get("regret") for s in sides for t in s["tasks"]):
        text += (
            " In 16 bit near-ties may fall either way: 'beyond rounding' counts tokens that are "
            "further from the target's choice than the type's rounding allows."
        )
    if weights := [t["memory_bytes"] for s in sides for t in s["tasks"] if "memory_bytes" in t]:
        parts = {name: max(w[name] or 0 for w in weights) / 1e6 for name in weights[0]}
        text += f" Weights: target {parts['target']:.1f} MB, drafter {parts['drafter']:.1f} MB"
        text += f"; at most {parts['peak']:.0f} MB held." if parts["peak"] else "."
    found = [_section("Tasks", text, tables)]
    joined = {s["side"]: s for s in sides}
    plots, positions = [], _positions(joined)
    if any(positions.values()):
        figure = charts.by_position(positions)
        plots.append(plot("positions", figure, "Acceptance by position",
                          "Share of rounds in which offset k was accepted."))  # fmt: skip
    if all("accepted_histogram" in t for s in sides for t in s["tasks"]):
        counts = {n: _summed(s["tasks"], "accepted_histogram") for n, s in joined.items()}
        plots.append(plot("histogram", charts.histogram(counts), "Accepted tokens a round",
                          "Over all tasks; the last bar is a full accept."))  # fmt: skip
    found.append(_section("Where drafts are accepted", tables=_groups(joined), plots=plots))
    timed = [t for s in sides for t in s["tasks"] if "milliseconds_per_round" in t]
    if timed:
        rows = [
            [s["side"], t["task"],
             *(number(t["milliseconds_per_round"][p], 2) for p in ("draft", "verify", "rest")),
             *(number(t["milliseconds_to_first_token"][p], 1) for p in ("target", "speculative"))]
            for s in sides for t in s["tasks"]
        ]  # fmt: skip
        columns = ["drafter", "task", "draft", "verify", "rest", "first token, target",
                   "first token, with drafter"]  # fmt: skip
        found.append(_section("Milliseconds a round", tables=[_table("", columns, rows)]))
    return found


def comparison_rows(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of paired differences."""
    columns = ["", "against", "task", "Δτ", "95 %", "speed", "95 %"]
    return columns, [
        [c["side"], c["against"], c["task"], f"{c['tau_difference']:+.3f}",
         spread(c["tau_interval"], "+.2f"), times(c["speed_ratio"]), spread(c["speed_interval"])]
        for c in rows
    ]  # fmt: skip


def _summed(tasks: Sequence[dict], key: str) -> list[float]:
    rows = [t[key] for t in tasks]
    width = max(map(len, rows))
    return [sum(r[k] for r in rows if k < len(r)) for k in range(width)]


def _positions(sides: dict[str, dict]) -> charts.Series:
    """Acceptance by position over all tasks: their rounds together."""
    found = {}
    for name, side in sides.items():
        weighted = [
            {"all": [a * t["rounds"] for a in t["acceptance_by_position"]]} for t in side["tasks"]
            if t["rounds"]
        ]  # fmt: skip
        total = sum(t["rounds"] or 0 for t in side["tasks"])
        found[name] = [n / total for n in _summed(weighted, "all")] if weighted else []
    return found


def _groups(sides: dict[str, dict]) -> list[dict]:
    """τ by context, turn and part, a column a side; rounds of all tasks together."""
    tables = []
    for key, title in GROUPS.items():
        sums: dict[str, dict[str, list[float]]] = {}
        for name, side in sides.items():
            for task in side["tasks"]:
                for g in task.get(key) or ():
                    cell = sums.setdefault(g["group"], {}).setdefault(name, [0.0, 0])
                    cell[0] += g["tau"] * g["rounds"]
                    cell[1] += g["rounds"]
        if len(sums) > 1:
            rows = [
                [group, *(number(c[n][0] / c[n][1]) if n in c else "–" for n in sides)]
                for group, c in sorted(sums.items(), key=lambda pair: _order(pair[0]))
            ]
            tables.append(_table(title, ["", *sides], rows))
    return tables


def _order(group: str) -> tuple[bool, int]:
    """Numbers ascend, thinking comes before the answer."""
    digits = group.split("–")[0].split(" ")[0]
    return (False, int(digits)) if digits.isdigit() else (True, group == "answer")


def _lengths(e: dict, plot) -> list[dict]:
    found = []
    for i, advice in enumerate(e.get("draft_lengths") or ()):
        how = "exact" if not e["temperature"] else "drawn given the text"
        text = (
            f"On this machine {best_length(advice)}. τ at each "
            f"length is {how}, by hindsight on {advice['responses']} responses; "
            "a round's cost is timed in the decode loop. For other hardware: what memory bandwidth "
            f"and matrix rate allow in 16 bit, {advice['context']} tokens of context a request, "
            "and nothing else costing time, so an upper bound."
        )
        tables = [_table("", *length_rows(advice))]
        if advice["elsewhere"]:
            tables.append(_table("On other hardware, at best", *elsewhere_rows(advice)))
        figure = charts.draft_lengths(advice)
        plots = [plot(f"draft-lengths-{i}", figure, "This machine", "Speed-up by draft length.")]
        for place in [x["hardware"] for x in advice["elsewhere"][:1]]:
            figure = charts.elsewhere(advice, place)
            what = "What its bandwidth and matrix rate allow, by requests at a time."
            plots.append(plot(f"elsewhere-{i}", figure, place, what))
        found.append(_section(f"Which draft length: {advice['drafter']}", text, tables, plots))
    return found


def best_length(advice: dict) -> str:
    """Half a sentence."""
    if not advice["best"]:
        return "no draft length pays: the target alone is faster"
    return f"draft length {advice['best']} is best"


def length_rows(advice: dict) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of what each draft length costs and brings here."""
    rows = [
        [str(r["draft_length"]), number(r["tau"]),
         *(number(ms, 2) for ms in r["milliseconds"].values()), times(r["speedup"]),
         times(r["measured"] and r["measured"]["speedup"])]
        for r in advice["lengths"]
    ]  # fmt: skip
    return ["K", "τ", "draft, ms", "verify, ms", "rest, ms", "predicted", "measured"], rows


def elsewhere_rows(advice: dict) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the best draft length on other hardware, by requests at a time."""
    batches = list(dict.fromkeys(e["batch"] for e in advice["elsewhere"]))
    rows: dict[str, list[str]] = {}
    for e in advice["elsewhere"]:
        cells = rows.setdefault(
            e["hardware"],
            [f"{e['hardware']} ({e['gigabytes_per_second']:g} GB/s, {e['teraflops']:g} TFLOP/s)"],
        )
        cells.append(f"{times(e['speedup'])}, K = {e['best']}" if e["best"] else "none pays")
    return ["", *(f"{b} at a time" for b in batches)], list(rows.values())


def _concurrency(e: dict, plot) -> list[dict]:
    found = []
    if e.get("concurrency"):
        text = "Prompts of every task in turn; batches begin together and are full."
        found.append(("Requests at a time", text, e["concurrency"]))
    for task in e["tasks"]:
        rows = [
            {
                "batch": row["in_flight"],
                "side": BASELINE if side == "target" else "served with the drafter",
                "tau": row.get("tau") if side == "speculative" else None,
                "speedup": row.get("speedup") if side == "speculative" else None,
                **row[side],
            }
            for row in task.get("concurrency") or ()
            for side in ("target", "speculative")
            if side in row
        ]
        if rows:
            text = "Requests the server had at a time; at the end of a level they are fewer."
            found.append((f"Requests at a time: {task['task']}", text, rows))
    sections = []
    columns = ["", "at a time", "tokens/s", "speed-up", "s a request", "95 % within, s", "τ"]
    for i, (title, text, rows) in enumerate(found):
        cells = [
            [r["side"], r["batch"], number(r["tokens_per_second"], 1), times(r["speedup"]),
             number(r["seconds_per_request"]["mean"], 2),
             number(r["seconds_per_request"]["p95"], 2), number(r["tau"])]
            for r in rows
        ]  # fmt: skip
        figure = plot(f"concurrency-{i}", charts.concurrency(rows, BASELINE), "Throughput",
                      "All requests together, prefill included.")  # fmt: skip
        sections.append(_section(title, text, [_table("", columns, cells)], [figure]))
    return sections


def _analysis(analyses: dict[str, dict], plot) -> dict:
    shares = [
        [name, number(a["tau"]), *(f"{100 * x:.1f} %" for x in a["share"].values())]
        for name, a in analyses.items()
    ]
    columns = ["replayed draft tokens", "τ", "accepted", "first rejected", "suffix behind it"]
    plots = [
        plot("mismatch", charts.mismatch(analyses), "Mismatch in the states the drafter visits",
             "Mean KL between target p and drafter q. trajectory: every offset scored on the text, "
             "as teacher forcing sees it; the others in the drafted states."),
        plot("anchors", charts.anchors(analyses), "Where rounds begin",
             "Rounds by tenth of the response."),
    ]  # fmt: skip
    return _section("Where the drafter fails", "", [_table("", columns, shares)], plots)


def _yaml(value: dict) -> str:
    plain = json.loads(json.dumps(value))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
