"""Plots of the benchmarks: one style, colours that colour-blind readers tell apart, PNG files."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from util.errors import UserError
from util.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# The palette of Okabe and Ito (2008).
BLUE, ORANGE, GREEN, RED, BLACK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#000000"
PURPLE, SKY, GREY, LIGHT = "#CC79A7", "#56B4E9", "#999999", "#EDEDED"
SERIES_COLOURS = (RED, BLUE, GREEN, PURPLE, ORANGE, SKY, BLACK)
DPI = 150

Point = tuple[float, float]
Interval = tuple[float, float, float, float]  # a point, and the ends of y's interval
Panels = Mapping[str, Mapping[str, Sequence[Point | Interval]]]


def require_matplotlib() -> None:
    """UserError without matplotlib, before minutes of measuring."""
    if find_spec("matplotlib") is None:
        raise UserError("figures need matplotlib: install it with `pip install '.[figures]'`")


def style() -> AbstractContextManager[None]:
    """The context in which figures are drawn and saved."""
    from matplotlib import rc_context

    return rc_context(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": LIGHT,
            "axes.axisbelow": True,
            "axes.titlesize": 10,
            "legend.frameon": False,
        }
    )


def save(figure: "Figure", path: Path) -> None:
    """Write a PNG, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)


def _plain_ticks(axis: "Axis") -> None:
    """A logarithmic axis with ticks at 1, 2 and 5 times powers of ten, as plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def save_budget_plot(
    path: Path,
    title: str,
    places: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    level: tuple[str, float],
) -> None:
    """Positive values of each series at named places, None where there is none; logarithmic axis.

    level: name and value of a horizontal line.
    """
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        for colour, (name, values) in zip(SERIES_COLOURS, series.items(), strict=False):
            known = [(place, y) for place, y in zip(places, values, strict=True) if y is not None]
            axes.plot(*zip(*known, strict=True), marker="o", ms=4, color=colour, label=name)
        axes.axhline(level[1], color=BLACK, ls="--", label=level[0])
        axes.set(title=title, yscale="log")
        _plain_ticks(axes.yaxis)
        figure.legend(loc="outside right upper")
        save(figure, path)


def save_cost_plot(
    path: Path, title: str, y_name: str, panels: Panels, marks: Mapping[str, Mapping[str, Point]]
) -> None:
    """One panel per x axis, each with the same named series of points; x > 0 logarithmic, y shared.

    Points of a series are joined in the order of x. With intervals, drawn as bars, y is linear and 0 a
    line; without, y > 0 is logarithmic. marks: panel -> name -> a point to ring and name.
    """
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(11, 3.8), layout="constrained")
        row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (x_name, series) in zip(row, panels.items(), strict=True):
            for colour, (name, points) in zip(SERIES_COLOURS, series.items(), strict=False):
                x, y, *ends = zip(*sorted(points), strict=True)
                label = name if axes is row[0] else None
                axes.plot(x, y, marker="o", ms=4, color=colour, label=label)
                if ends:
                    axes.vlines(x, *ends, color=colour, lw=0.8, alpha=0.5)
            for name, point in marks[x_name].items():
                axes.plot(*point, "o", ms=10, mfc="none", mec=BLACK)
                axes.annotate(name, point, (0, 9), textcoords="offset points", ha="center")
            axes.set(xlabel=x_name, xscale="log")
            _plain_ticks(axes.xaxis)
            if ends:
                axes.axhline(0, color=GREY, lw=1, zorder=0)
            else:
                axes.set_yscale("log")
                _plain_ticks(axes.yaxis)
        row[0].set_ylabel(y_name)
        figure.suptitle(title)
        figure.legend(loc="outside right upper")
        save(figure, path)
