"""A plot of a benchmark's figures as SVG, if matplotlib is installed (the extra ``benchmark``)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from benchmarks.harness.results import Bar

MISSING = "no plot: matplotlib is not installed (pip install 'ml-debugger[benchmark]')"


def draw_bars(path: Path, title: str, unit: str, bars: list[Bar], target: float | None) -> bool:
    """Write one horizontal bar a figure, with its interval; False where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.2 + 0.4 * len(bars)), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    values = [bar.value for bar in bars]
    lower = [bar.value - (bar.value if bar.low is None else bar.low) for bar in bars]
    upper = [(bar.value if bar.high is None else bar.high) - bar.value for bar in bars]
    axes.barh([bar.label for bar in bars], values, xerr=[lower, upper], color="#4878a8", ecolor="#222222")
    for position, value in enumerate(values):
        end = value + max(upper[position], 0)
        axes.annotate(f"{value:.4g}", (end, position), xytext=(4, 0), textcoords="offset points", va="center")
    axes.margins(x=0.15)
    if target is not None:
        axes.axvline(target, color="#b03030", linestyle="--")
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.set_title(title, loc="left", fontsize=10)
    figure.savefig(path)
    return True
