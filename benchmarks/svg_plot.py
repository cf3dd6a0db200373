"""A line plot as an SVG file, without a plotting library: named series over named places on the x axis."""

from collections.abc import Mapping, Sequence
from html import escape
from math import floor, log10

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 60, 150, 30, 45  # margins, pixels
COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf")


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten from low to high."""
    decades = range(floor(log10(low)), floor(log10(high)) + 1)
    values = [m * 10.0**d for d in decades for m in (1, 2, 5)]
    return [value for value in values if low <= value <= high]


def line_plot(
    title: str,
    places: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    level: tuple[str, float] | None = None,
) -> str:
    """SVG text: positive values of each series on a logarithmic axis, None where there is none.

    `level` is a named horizontal line.
    """
    values = [v for line in series.values() for v in line if v is not None]
    values += [level[1]] if level else []
    low, high = min(values) / 1.15, max(values) * 1.15

    def x(i: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (i / max(1, len(places) - 1))

    def y(value: float) -> float:
        share = (log10(value) - log10(low)) / (log10(high) - log10(low))
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    def text(at_x: float, at_y: float, words: str, anchor: str = "middle") -> str:
        return f'<text x="{at_x:.1f}" y="{at_y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'

    end = WIDTH - RIGHT
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        text((LEFT + end) / 2, 18, title),
    ]
    for value in _ticks(low, high):
        at = y(value)
        out.append(f'<path d="M{LEFT} {at:.1f}H{end}" stroke="#ddd"/>')
        out.append(text(LEFT - 6, at + 4, f"{value:g}", "end"))
    out += [text(x(i), HEIGHT - BOTTOM + 18, place) for i, place in enumerate(places)]
    if level:
        at = y(level[1])
        out.append(f'<path d="M{LEFT} {at:.1f}H{end}" stroke="black" stroke-dasharray="5 4"/>')
        out.append(text(end + 8, at + 4, level[0], "start"))
    for k, (name, line) in enumerate(series.items()):
        colour = COLOURS[k % len(COLOURS)]
        points = [(x(i), y(value)) for i, value in enumerate(line) if value is not None]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in points]
        key = TOP + 60 + 18 * k
        out.append(f'<path d="M{end + 10} {key}h18" stroke="{colour}" stroke-width="2"/>')
        out.append(text(end + 34, key + 4, name, "start"))
    return "\n".join([*out, "</svg>", ""])
