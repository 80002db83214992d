"""The demo's report: plots as SVG files, and one HTML page that holds them and opens offline."""

from __future__ import annotations

import json
from pathlib import Path

from jinja2 import Environment
from matplotlib.figure import Figure

from draft_opd.files import make_folder, write_text
from draft_opd.plots import new_axes, svg

COLOURS = {"sft": "#7f7f7f", "sft_continued": "#1f77b4", "draft_opd": "#d62728"}
LABELS = {
    "untrained": "untrained",
    "sft": "SFT, at its plateau",
    "sft_continued": "SFT, continued",
    "draft_opd": "Draft-OPD",
}

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Draft-OPD demo</title><style>
body{font:16px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse}
td,th{padding:.3em .8em;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}svg{max-width:100%;height:auto}
.note{color:#555;font-size:.9em}</style></head><body>
<h1>Draft-OPD demo</h1>
<p>A {{ family }} drafter for the shipped target, trained by SFT to its plateau; from there, once by
more SFT and once by Draft-OPD, with equal steps, batches, schedule and draft blocks. Seed
{{ seed }}.</p>
<table><tr><th></th><th>τ</th><th>steps</th><th>supervised tokens</th><th>speed-up</th></tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}
</table>
<p><b>Draft-OPD against continued SFT: {{ "%+.1f" | format(100 * gain) }} % τ.</b>
The same text as the target alone on {{ lossless.matched }} of {{ lossless.of }} decodings
(every held-out prompt, with every drafter).</p>
<p class="note">τ: tokens committed a round, bonus token included, by real greedy decoding of
{{ prompts }} held-out prompts. Speed-up: against the target alone, one prompt at a time, on this
machine; a small target on a CPU gains little, because verifying a block costs it several single
steps. τ is what carries over to a GPU.</p>
<table><tr><th>replayed draft tokens</th>{% for name in composition[0][1] %}<th>{{ name }}</th>
{% endfor %}</tr>{% for label, share in composition %}<tr><td>{{ label }}</td>
{% for value in share.values() %}<td>{{ "%.1f %%" | format(100 * value) }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% for title, text, plot in plots %}
<h2>{{ title }}</h2><p>{{ text }}</p>{{ plot | safe }}
{% endfor %}
</body></html>
"""


def read_metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def write_report(out: Path, summary: dict, details: dict) -> Path:
    """Writes `report.html` and `plots/*.svg` into a demo folder, from what its runs recorded.

    `details` has `family`, `prompts`, `positions` {name: acceptance by position}, `analysis`
    {name: result of `analyse`}, `supervised` {name: tokens}.
    """
    plots = {
        "plateau": _plateau(out, summary),
        "positions": _positions(details["positions"]),
        "mismatch": _mismatch(details["analysis"]),
        "anchors": _anchors(details["analysis"]),
        "halves": _halves(out),
    }
    folder = make_folder(out / "plots")
    for name, drawing in plots.items():
        write_text(folder / f"{name}.svg", drawing)
    texts = {
        "plateau": (
            "Held-out τ over steps",
            "SFT first; then both ways on, from the same drafter.",
        ),
        "positions": ("Acceptance by position", "Share of rounds in which offset k was accepted."),
        "mismatch": (
            "Mismatch in the states the drafter visits",
            "Mean KL between target and drafter. trajectory: every offset scored on the text, as "
            "teacher forcing sees it; the others in the drafted states: accepted offsets, the "
            "first rejected one, and the suffix behind it.",
        ),
        "anchors": ("Where rounds begin", "Rounds by tenth of the response."),
        "halves": (
            "Accepted lengths while Draft-OPD trains",
            "Share of the rounds of its traces that accepted n tokens, in the first and in the "
            "second half of the steps; the last one is a full accept.",
        ),
    }
    rows = [
        [
            LABELS[name],
            f"{tau:.3f}",
            summary["steps"].get(name, 0),
            f"{details['supervised'].get(name, 0):,}",
            f"{summary['speedup'][name]:.2f}×" if name in summary["speedup"] else "",
        ]
        for name, tau in summary["tau"].items()
    ]
    page = Environment(autoescape=True).from_string(PAGE)
    html = page.render(
        rows=rows,
        composition=[(LABELS[n], found["share"]) for n, found in details["analysis"].items()],
        plots=[(*texts[name], drawing) for name, drawing in plots.items()],
        family=details["family"],
        prompts=details["prompts"],
        **{k: summary[k] for k in ("seed", "gain", "lossless")},
    )
    path = out / "report.html"
    write_text(path, html)
    return path


def _plateau(out: Path, summary: dict) -> str:
    figure, axes = new_axes("step", "held-out τ")
    for name, colour in COLOURS.items():
        start = 0 if name == "sft" else summary["steps"]["sft"]
        points = [(start + m["step"], m["tau"]) for m in read_metrics(out / name) if "tau" in m]
        axes.plot(*zip(*points, strict=True), color=colour, label=LABELS[name], marker=".")
    axes.legend(frameon=False)
    return svg(figure)


def _positions(positions: dict[str, list[float]]) -> str:
    figure, axes = new_axes("offset k in the block", "accepted")
    for name, values in positions.items():
        axes.plot(range(1, len(values) + 1), values, color=COLOURS.get(name), label=LABELS[name])
    axes.set_ylim(0, 1)
    axes.legend(frameon=False)
    return svg(figure)


def _mismatch(analysis: dict[str, dict]) -> str:
    figure = Figure(figsize=(7, 3.2))
    for i, (key, title) in enumerate((("forward_kl", "KL(p‖q)"), ("reverse_kl", "KL(q‖p)"))):
        axes = figure.add_subplot(1, 2, i + 1)
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        for j, (name, found) in enumerate(analysis.items()):
            groups = list(found[key])
            values = [found[key][g] or 0.0 for g in groups]
            at = [x + 0.38 * j - 0.19 for x in range(len(groups))]
            axes.bar(at, values, 0.36, color=COLOURS.get(name), label=LABELS[name])
            labels = [g.replace("_", "\n") for g in groups]
            axes.set_xticks(range(len(groups)), labels, fontsize=8)
        if i == 0:
            axes.legend(frameon=False, fontsize=8)
    return svg(figure)


def _halves(out: Path) -> str:
    figure, axes = new_axes("accepted length n", "share of rounds")
    counts = [m["rounds_by_accepted"] for m in read_metrics(out / "draft_opd") if "loss" in m]
    half = len(counts) // 2
    for label, part, shift in (("first half", counts[:half], -0.2), ("second", counts[half:], 0.2)):
        sums = [sum(column) for column in zip(*part, strict=True)]
        total = max(1, sum(sums))
        axes.bar([n + shift for n in range(len(sums))], [x / total for x in sums], 0.4, label=label)
    axes.legend(frameon=False)
    return svg(figure)


def _anchors(analysis: dict[str, dict]) -> str:
    figure, axes = new_axes("part of the response", "rounds")
    for name, found in analysis.items():
        counts = found["anchors"]["by_tenth"]
        at = [(i + 0.5) / len(counts) for i in range(len(counts))]
        axes.plot(at, counts, color=COLOURS.get(name), label=LABELS[name], marker=".")
    axes.set_ylim(0)
    axes.legend(frameon=False)
    return svg(figure)
