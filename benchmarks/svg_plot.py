"""Line plots as SVG files, without a plotting library: over named places, or over numbers."""

from collections.abc import Mapping, Sequence
from html import escape
from math import floor, log10

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 60, 150, 30, 45  # margins, pixels
LEGEND = 230  # right margin for names as long as those of an ablation
COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf")


def _ticks(low: float, high: float, multiples: Sequence[int] = (1, 2, 5)) -> list[float]:
    """1, 2 and 5 times powers of ten from low to high."""
    decades = range(floor(log10(low)), floor(log10(high)) + 1)
    values = [m * 10.0**d for d in decades for m in multiples]
    return [value for value in values if low <= value <= high]


def _text(x: float, y: float, words: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _open(width: int, height: int) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]


def _line(points: Sequence[tuple[float, float]], colour: str) -> list[str]:
    """Points in pixels, joined."""
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    out = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>']
    return out + [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in points]


def _key(end: float, k: int, name: str) -> list[str]:
    """Entry k of the legend right of `end`."""
    at, colour = TOP + 60 + 18 * k, COLOURS[k % len(COLOURS)]
    line = f'<path d="M{end + 10} {at}h18" stroke="{colour}" stroke-width="2"/>'
    return [line, _text(end + 34, at + 4, name, "start")]


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

    end = WIDTH - RIGHT
    out = [*_open(WIDTH, HEIGHT), _text((LEFT + end) / 2, 18, title)]
    for value in _ticks(low, high):
        at = y(value)
        out.append(f'<path d="M{LEFT} {at:.1f}H{end}" stroke="#ddd"/>')
        out.append(_text(LEFT - 6, at + 4, f"{value:g}", "end"))
    out += [_text(x(i), HEIGHT - BOTTOM + 18, place) for i, place in enumerate(places)]
    if level:
        at = y(level[1])
        out.append(f'<path d="M{LEFT} {at:.1f}H{end}" stroke="black" stroke-dasharray="5 4"/>')
        out.append(_text(end + 8, at + 4, level[0], "start"))
    for k, (name, line) in enumerate(series.items()):
        points = [(x(i), y(value)) for i, value in enumerate(line) if value is not None]
        out += [*_line(points, COLOURS[k % len(COLOURS)]), *_key(end, k, name)]
    return "\n".join([*out, "</svg>", ""])


Point = tuple[float, float]
Panels = Mapping[str, Mapping[str, Sequence[Point]]]


def xy_plot(
    title: str, y_name: str, panels: Panels, marks: Mapping[str, Mapping[str, Point]] | None = None
) -> str:
    """SVG text: one panel per x axis, side by side, each with the same named series of (x, y) > 0.

    Logarithmic axes; y is shared. Points of a series are joined in the order of x. marks: panel ->
    name -> a point that is ringed and named.
    """
    inner, gap = WIDTH - LEFT - RIGHT, 50
    end = LEFT + len(panels) * (inner + gap) - gap
    width = end + LEGEND
    bottom = HEIGHT - BOTTOM
    out = [*_open(width, HEIGHT), _text((LEFT + end) / 2, 18, title)]
    out.append(_text(LEFT - 6, TOP - 8, y_name, "end"))
    y_of = _Axis([y for s in panels.values() for line in s.values() for _, y in line], bottom, TOP)
    for p, (x_name, series) in enumerate(panels.items()):
        start = LEFT + p * (inner + gap)
        x_of = _Axis([x for line in series.values() for x, _ in line], start, start + inner)
        for value in y_of.ticks:
            at = y_of(value)
            out.append(f'<path d="M{start} {at:.1f}h{inner}" stroke="#ddd"/>')
            out += [_text(start - 6, at + 4, f"{value:g}", "end")] if p == 0 else []
        for value in x_of.ticks:
            at = x_of(value)
            out.append(f'<path d="M{at:.1f} {TOP}V{bottom}" stroke="#eee"/>')
            out.append(_text(at, bottom + 18, f"{value:g}"))
        out.append(_text(start + inner / 2, bottom + 36, x_name))
        for k, line in enumerate(series.values()):
            points = [(x_of(x), y_of(y)) for x, y in sorted(line)]
            out += _line(points, COLOURS[k % len(COLOURS)])
        for name, (x, y) in (marks or {}).get(x_name, {}).items():
            a, b = x_of(x), y_of(y)
            out.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="7" fill="none" stroke="black"/>')
            out.append(_text(a, b - 12, name))
    for k, name in enumerate(next(iter(panels.values()))):
        out += _key(end, k, name)
    return "\n".join([*out, "</svg>", ""])


class _Axis:
    """Numbers to pixels from `first` to `last`, logarithmically, with a little room at both ends."""

    def __init__(self, values: Sequence[float], first: float, last: float) -> None:
        low, high = min(values) / 1.1, max(values) * 1.1
        self.low, self.high, self.first, self.last = log10(low), log10(high), first, last
        self.ticks = _ticks(low, high)
        if len(self.ticks) < 3:
            self.ticks = _ticks(low, high, range(1, 10))

    def __call__(self, value: float) -> float:
        share = (log10(value) - self.low) / (self.high - self.low)
        return self.first + (self.last - self.first) * share
