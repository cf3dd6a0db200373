"""What the rows of the ablation "frontier" say: a plot of quality over cost, and sentences."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.ablation_rows import STEPS, Row, Series, rivals
from benchmarks.plots import Interval, Point, save_cost_plot
from models.fast_mar import PRESETS
from models.lazy_mar import LazyMARConfig

Result = dict[str, Any]  # a measured row


def quality_of(rows: list[Result]) -> tuple[str, str]:
    """Key and name of the measure that is compared: patch FD where it is known, it has an interval."""
    if all("patch_frechet" in row for row in rows):
        return "patch_frechet", "patch FD"
    return "fid", "FID"


def undominated(rows: list[Result], cost: str) -> list[Result]:
    """Rows that no other beats in both quality and cost, the cheapest first."""
    best, found, (key, _) = float("inf"), [], quality_of(rows)
    for row in sorted(rows, key=lambda row: (row[cost], row[key])):
        if row[key] < best:
            best = row[key]
            found.append(row)
    return found


def default_row(rows: list[Result], base: LazyMARConfig) -> Result:
    """LazyMAR as it is unless told otherwise; `base` is its configuration."""
    default = _task(Row("", base, STEPS))
    return next(row for row in rows if _measured(row) == default)


def conclusion(rows: list[Result], base: LazyMARConfig) -> str:
    """What the frontier says, in sentences made from its numbers; `base` is the default row's."""
    lazy, (key, measure) = default_row(rows, base), quality_of(rows)
    lines = [
        f"LazyMAR with {STEPS} steps has {measure} {lazy[key]:.3f} at {lazy['tflops_executed']:.3g} "
        f"TFLOPs per image as executed, MAR {rows[0][key]:.3f} at {rows[0]['tflops_executed']:.3g}."
    ]
    for name, config in rivals(base).items():
        tasks = [_task(Row("", config, steps)) for steps in range(1, STEPS + 1)]
        own = [row for row in rows if _measured(row) in tasks]
        near = min(own, key=lambda row: abs(row["tflops_executed"] - lazy["tflops_executed"]))
        lines.append(
            f"Nearest to the cost of LazyMAR is, of {name}, the row with {near['num_iter']} steps: "
            f"{measure} {near[key]:.3f} at {near['tflops_executed']:.3g} TFLOPs."
        )
    if key == "patch_frechet":
        return "\n\n".join([*lines, worse_than_mar(rows)]) + "\n"
    for cost, title in (("tflops_executed", "FLOPs"), ("s_per_image", "seconds")):
        names = "; ".join(row["name"] for row in undominated(rows, cost))
        lines.append(f"No row has both a lower {measure} and fewer {title} than: {names}.")
    return "\n\n".join(lines) + "\n"


def worse_than_mar(rows: list[Result]) -> str:
    """Which rows have a higher patch FD than MAR, the first row, with 95% confidence."""
    names = [row["name"] for row in rows[1:] if row["patch_difference"][1] > 0]
    return f"Rows whose 95% interval lies above MAR's patch FD: {'; '.join(names) or 'none'}."


def draw(path: Path, series: Series, rows: list[Result], base: LazyMARConfig) -> None:
    """Plot quality over operations and over seconds: FID, or the difference of patch FD to MAR's."""
    key, y_name = quality_of(rows)
    found = {_measured(row): row for row in rows}
    named = {row["name"]: row for row in rows if row["name"] in PRESETS}
    named |= {"MAR": rows[0], "LazyMAR": default_row(rows, base)}
    if key == "patch_frechet":
        key, y_name = "patch_difference", "patch FD - MAR's, 95%"
    panels: dict[str, dict[str, list[Point | Interval]]] = {}
    marks: dict[str, dict[str, Point]] = {}
    for title, cost in (
        ("TFLOPs per image, executed", "tflops_executed"),
        ("s / image", "s_per_image"),
    ):
        points = {task: _point(row, cost, key) for task, row in found.items()}
        panels[title] = {
            name: [points[_task(row)] for row in line] for name, line in series.items()
        }
        marks[title] = {name: points[_measured(row)][:2] for name, row in named.items()}
    save_cost_plot(path, "Quality over cost", y_name, panels, marks)


def _point(row: Result, cost: str, key: str) -> Point | Interval:
    """Cost and quality, and the interval of a difference, which MAR has none of."""
    if key == "patch_difference":
        y, low, high = row[key] or (0.0, 0.0, 0.0)
        return row[cost], y, low, high
    return row[cost], row[key]


def _task(row: Row) -> str:
    """Names what decides a row's images."""
    lazy_mar = row.config and asdict(row.config)
    return _text(row.num_iter, lazy_mar, asdict(row.head), row.order.kind)


def _measured(row: Result) -> str:
    """_task of a measured row."""
    return _text(row["num_iter"], row["lazy_mar"], row["head"], row["order"])


def _text(*parts: object) -> str:
    return json.dumps(parts, sort_keys=True)
