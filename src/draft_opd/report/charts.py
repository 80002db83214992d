"""The plots of a report: figures from what eval.json, analysis.json and run folders hold."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

from matplotlib.figure import Figure

from draft_opd.evaluation.analysis import GROUPS
from draft_opd.evaluation.result import Advice
from draft_opd.report.plot_style import COLOURS, GREY, INK, as_text, label, legend, new_axes, plain
from draft_opd.training.run_folder import History

Series = dict[str, Sequence[float]]


def training(branches: dict[str, list[History]]) -> Figure:
    """Held-out τ over steps: each branch goes on where the run it began from ended."""
    figure, axes = new_axes("training step", "held-out τ")
    drawn, colours = set(), cycle(COLOURS)
    for name, runs in branches.items():
        start = 0
        for run in runs:
            points = [(start + step, tau) for step, tau in run.taus]
            start += run.recipe["steps"]
            if run.path in drawn or not points:
                continue
            drawn.add(run.path)
            shown = name if run is runs[-1] else run.name
            axes.plot(*zip(*points, strict=True), color=next(colours), label=label(shown), marker=".")
    legend(axes)
    return figure


def by_position(series: Series) -> Figure:
    """Acceptance at offsets 1..K."""
    figure, axes = new_axes("offset k in the block", "accepted")
    for colour, (name, values) in zip(cycle(COLOURS), series.items(), strict=False):
        axes.plot(range(1, len(values) + 1), values, color=colour, label=label(name), marker=".")
    axes.set_ylim(0, 1)
    legend(axes)
    return figure


def histogram(series: Series) -> Figure:
    """Share of rounds that accepted 0..K tokens."""
    figure, axes = new_axes("accepted tokens a round", "share of rounds")
    width = 0.8 / max(len(series), 1)
    for i, (name, counts) in enumerate(series.items()):
        total = max(1, sum(counts))
        at = [n + (i + 0.5) * width - 0.4 for n in range(len(counts))]
        shares = [c / total for c in counts]
        axes.bar(at, shares, width, color=COLOURS[i % len(COLOURS)], label=label(name))
    legend(axes, below=True)
    return figure


def draft_lengths(advice: Advice) -> Figure:
    """Speed-up on this machine over the draft length, predicted and measured."""
    rows = advice.lengths
    figure, axes = new_axes("draft length K", "speed-up")
    axes.plot(
        [r.draft_length for r in rows],
        [r.speedup for r in rows],
        color=COLOURS[0],
        marker=".",
        label="predicted",
    )
    seen = [(r.draft_length, r.measured.speedup) for r in rows if r.measured]
    if seen:
        axes.plot(
            *zip(*seen, strict=True), "o", color=COLOURS[1], ms=9, mfc="none", mew=1.6, label="measured"
        )
    axes.axhline(1, color=GREY, lw=0.8)
    axes.set_ylim(0)
    legend(axes)
    return figure


def elsewhere(advice: Advice, hardware: str) -> Figure:
    """Speed-up over the draft length that other hardware allows, by requests at a time."""
    at = [r.draft_length for r in advice.lengths]
    figure, axes = new_axes("draft length K", "speed-up, at best")
    mine = [e for e in advice.elsewhere if e.hardware == hardware]
    for colour, e in zip(cycle(COLOURS), mine, strict=False):
        axes.plot(at, e.by_length, color=colour, marker=".", label=f"{e.batch} at a time")
    axes.axhline(1, color=GREY, lw=0.8)
    axes.set_ylim(0)
    legend(axes)
    return figure


def concurrency(points: Sequence[tuple[str, int, float]], alone: str) -> Figure:
    """Tokens a second against requests at a time; points: (side, at a time, tokens/s)."""
    figure, axes = new_axes("requests at a time", "tokens/s")
    names = dict.fromkeys(side for side, _, _ in points)
    colours = cycle(COLOURS)
    for name in names:
        mine = [(batch, rate) for side, batch, rate in points if side == name]
        colour = GREY if name == alone else next(colours)
        axes.plot(*zip(*mine, strict=True), color=colour, label=label(name), marker=".")
    axes.set_xscale("log", base=2)
    ticks = sorted({batch for _, batch, _ in points})
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.set_ylim(0)
    legend(axes)
    return figure


def confidence(found: dict[str, dict]) -> Figure:
    """What passed over what was said, by tenths of it; each value is a result of `Calibration`."""
    figure, axes = new_axes("said chance", "passed")
    axes.plot([0, 1], [0, 1], color=GREY, lw=0.8)
    for colour, (name, value) in zip(cycle(COLOURS), found.items(), strict=False):
        points = [(b["said"], b["passed"]) for b in value["bins"] if b["tokens"]]
        axes.plot(*zip(*points, strict=True), color=colour, label=label(name), marker=".")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    legend(axes)
    return figure


def mismatch(analyses: dict[str, dict]) -> Figure:
    """Mean KL between target and drafter by the state that drafts are in."""
    figure = Figure(figsize=(5.4, 2.9))
    for place, (key, title) in enumerate((("forward_kl", "KL(p‖q)"), ("reverse_kl", "KL(q‖p)")), 1):
        axes = figure.add_subplot(1, 2, place)
        axes.set_title(title, fontsize=10)
        plain(axes)
        width = 0.8 / len(analyses)
        for j, (name, found) in enumerate(analyses.items()):
            at = [x + (j + 0.5) * width - 0.4 for x in range(len(GROUPS))]
            values = [found[key][g] or 0.0 for g in GROUPS]
            axes.bar(at, values, width, color=COLOURS[j % len(COLOURS)], label=label(name))
        labels = [g.replace("_", "\n") for g in GROUPS]
        axes.set_xticks(range(len(GROUPS)), labels, fontsize=7.5, rotation=40, color=INK)
    handles = figure.axes[0].get_legend_handles_labels()
    as_text(
        figure.legend(
            *handles,
            frameon=False,
            fontsize=9,
            labelcolor=INK,
            ncols=3,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.08),
        )
    )
    figure.subplots_adjust(wspace=0.3)
    return figure


def anchors(analyses: dict[str, dict]) -> Figure:
    """Where rounds begin, by tenth of the response."""
    figure, axes = new_axes("part of the response", "rounds")
    for colour, (name, found) in zip(cycle(COLOURS), analyses.items(), strict=False):
        counts = found["anchors"]["by_tenth"]
        at = [(i + 0.5) / len(counts) for i in range(len(counts))]
        axes.plot(at, counts, color=colour, label=label(name), marker=".")
    axes.set_ylim(0)
    legend(axes)
    return figure


def halves(run: History) -> Figure | None:
    """Accepted lengths in the traces of the first and second half of a Draft-OPD run."""
    counts = [m["rounds_by_accepted"] for m in run.metrics if "rounds_by_accepted" in m]
    half = len(counts) // 2
    if not half:
        return None
    parts = {"first half of the steps": counts[:half], "second half": counts[half:]}
    return histogram({k: [sum(c) for c in zip(*v, strict=True)] for k, v in parts.items()})
