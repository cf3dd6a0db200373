"""The figures of benchmarks/redundancy.py."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.plots import BLACK, BLUE, GREEN, GREY, LIGHT, ORANGE, RED, save, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GROUP_STYLES = {
    "earlier": ("decoded earlier", BLUE, "-"),
    "previous": ("decoded in the previous step", RED, "-"),
    "now": ("decoded now", GREEN, "--"),
    "later": ("decoded later", ORANGE, "-"),
}
BRANCH_STYLES = {
    "conditional": ("conditional", BLUE, "-"),
    "unconditional": ("unconditional", GREEN, "--"),
    "residual": ("residual", RED, "-"),
}
STATES = {
    "n": ("decoded now", RED),
    "p": ("decoded in the previous step", ORANGE),
    "c": ("recomputed", BLUE),
    ".": ("from the cache", LIGHT),
}
STRIP_STEPS, STRIP_COLUMNS = 64, 16  # maps shown at most; maps in a row


def draw(document: dict[str, dict], image: np.ndarray, prefix: Path) -> None:
    """Write PREFIX_tokens.png, PREFIX_guidance.png, PREFIX_strip.png; image uint8 (H, W, 3)."""
    with style():
        figures = {
            "tokens": tokens_figure(document["tokens"]),
            "guidance": guidance_figure(document["guidance"]),
            "strip": strip_figure(document["strip"], image),
        }
        for name, figure in figures.items():
            save(figure, prefix.with_name(f"{prefix.name}_{name}.png"))


def tokens_figure(numbers: dict) -> "Figure":
    """Similarity by step and by layer, a line per group of tokens."""
    figure, (left, right) = _two_panels()
    for group, (name, colour, line) in GROUP_STYLES.items():
        values = numbers["by_step"][group]
        left.plot(numbers["steps"], _changes(values), line, color=colour, label=name)
        values = numbers["by_layer"][group]
        right.plot(_changes(values), line, marker="o", ms=4, color=colour)
    left.set(title="Decoder output", xlabel="decoding step")
    right.set(title="All decoder layers", xlabel="decoder layer, mean over steps")
    _whole_numbers(right)
    _similarity_axis([left, right])
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def guidance_figure(numbers: dict) -> "Figure":
    """Similarity of branches and residual by step; errors by age."""
    figure, (left, right) = _two_panels(sharey=False)
    for kind, (name, colour, line) in BRANCH_STYLES.items():
        left.plot(
            numbers["steps"], _changes(numbers["by_step"][kind]), line, color=colour, label=name
        )
    left.set(title="Decoder output of tokens not known yet", xlabel="decoding step")
    left.legend(loc="lower right")
    _similarity_axis([left])
    error, ages = numbers["error"], numbers["ages"]
    shown = {
        "old unconditional features": (error["unconditional"], GREEN, "--"),
        "conditional + old residual (LazyMAR)": (error["residual"], RED, "-"),
        "conditional, no residual": ([error["none"]] * len(ages), BLACK, ":"),
    }
    for name, (values, colour, line) in shown.items():
        marker = None if line == ":" else "o"
        right.plot(ages, values, line, marker=marker, ms=4, color=colour, label=name)
    right.set(title="Tokens decoded now", xlabel="age of what is reused, steps")
    right.set(ylabel="relative error of the unconditional features", ylim=(0, None))
    _whole_numbers(right)
    right.legend(loc="lower right")
    return figure


def strip_figure(numbers: dict, image: np.ndarray) -> "Figure":
    """Per step a map of the tokens, and below it the pixels of those that are known."""
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.patches import Patch, Rectangle

    grid, count = numbers["grid"], len(numbers["steps"])
    shown = np.unique(np.linspace(0, count - 1, min(count, STRIP_STEPS)).round().astype(int))
    columns = min(STRIP_COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.0, hspace=0.0)
    figure = Figure(figsize=(0.62 * columns, 1.36 * rows + 0.35), layout=layout)
    cells = figure.subplots(rows, columns, squeeze=False).flatten()
    colours = {state: to_rgb(colour) for state, (_, colour) in STATES.items()}
    ranks = np.array(numbers["ranks"]).reshape(grid, grid)
    size = image.shape[0] // grid, image.shape[1] // grid
    for cell in cells[len(shown) :]:
        cell.remove()
    for cell, i in zip(cells, shown, strict=False):
        cell.set_axis_off()
        states = np.array([colours[state] for state in numbers["maps"][i]])
        known = (ranks < numbers["known"][i]).repeat(size[0], 0).repeat(size[1], 1)
        pixels = np.where(known[:, :, None], image, 255)
        for picture, bottom in ((states.reshape(grid, grid, 3), 1.06), (pixels, 0)):
            extent = (0, 1, bottom, bottom + 1)
            cell.imshow(picture, interpolation="nearest", extent=extent, aspect="auto")
        cell.set(xlim=(-0.02, 1.02), ylim=(-0.02, 2.08), aspect="equal")
        cell.add_patch(Rectangle((0, 0), 1, 1, fill=False, ec=GREY, lw=0.5))
        if numbers["refresh"][i]:
            cell.add_patch(Rectangle((0, 1.06), 1, 1, fill=False, ec=BLACK, lw=1.5))
        cell.set_title(str(numbers["steps"][i]), fontsize=7, pad=1)
    patches = [Patch(color=colour, label=name) for name, colour in STATES.values()]
    patches.append(Patch(facecolor="white", edgecolor=BLACK, lw=1.5, label="refresh step"))
    figure.legend(handles=patches, loc="outside lower center", ncols=5)
    return figure


def _two_panels(sharey: bool = True) -> tuple["Figure", Sequence["Axes"]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    return figure, figure.subplots(1, 2, sharey=sharey)


def _changes(similarities: Sequence[float | None]) -> list[float]:
    """1 - similarity, which a logarithmic axis spreads; gaps stay gaps."""
    return [np.nan if s is None else max(1 - s, 1e-7) for s in similarities]


def _whole_numbers(axes: "Axes") -> None:
    """Ticks of the x axis at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))


def _similarity_axis(axes: Sequence["Axes"]) -> None:
    """A logarithmic axis of 1 - similarity that is labelled with the similarity, best on top."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    first = axes[0]
    first.set_yscale("log")
    first.invert_yaxis()
    first.yaxis.set_major_formatter(FuncFormatter(lambda change, _: f"{1 - change:.7g}"))
    first.yaxis.set_minor_formatter(NullFormatter())
    first.set_ylabel("cosine similarity to the step before")
