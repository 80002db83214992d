"""What every plot shares: axes without a frame, colours for light and dark, SVG and PNG."""

from __future__ import annotations

import io
import re

import matplotlib

matplotlib.use("Agg")

from matplotlib import rc_context
from matplotlib.figure import Figure

INK = "#1d2126"  # text and axes; in SVG the page's own text colour
# Told apart on white and on near-black, in this order; also by readers who mix up red and green.
COLOURS = ("#3478c6", "#e0702f", "#2f9e77", "#9a63c9", "#c9a227", "#d0508f", "#3aa0a8")
GREY = "#8a8f98"


def new_axes(x: str, y: str, height: float = 2.9, width: float = 5.0):
    """A figure with one pair of labelled axes; sizes in inches."""
    figure = Figure(figsize=(width, height))
    axes = figure.add_subplot()
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    plain(axes)
    return figure, axes


def plain(axes) -> None:
    """No frame, and everything that is no data in the colour of text."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color(INK)
    axes.tick_params(colors=INK, labelsize=9)
    axes.title.set_color(INK)


def legend(axes, below: bool = False) -> None:
    """Names of the series, where there are any; below the axes where they are many or in the way"""
    count = len(axes.get_legend_handles_labels()[1])
    if not count:
        return
    place = {}
    if below or count > 3:
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.19), "ncols": min(count, 3)}
    as_text(axes.legend(frameon=False, fontsize=9, labelcolor=INK, **place))


def label(name: str) -> str:
    """A name of the user's as a label: matplotlib leaves out those that begin with _."""
    return f"\u200a{name}" if name.startswith("_") else name


def as_text(legend) -> None:
    """Names are no formulas, even with a $ in them."""
    for text in legend.get_texts():
        text.set_parse_math(False)


def svg(figure: Figure, inline: bool = False) -> str:
    """The figure as an `<svg>` element; `inline`: with the text colour and font of its page."""
    buffer = io.StringIO()
    options = {"transparent": True} if inline else {"facecolor": "white"}
    with rc_context({"svg.fonttype": "none" if inline else "path"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", **options)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    if inline:
        text = text.replace(INK, "currentColor")
        text = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", text)
    return text


def png(figure: Figure) -> bytes:
    """For a paper or a slide: on white, 200 dots an inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", dpi=200, facecolor="white")
    return buffer.getvalue()
