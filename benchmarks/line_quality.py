"""FID and accuracy of the bundled GPT for every method and budget of cache compression.

    python -m benchmarks.line_quality --num_images 1000

All rows have the same labels and seeds, so they differ only in the cache. A row is written when it is
finished, with its commit; the same command resumes. Results:
output_dir/benchmarks/line_quality.{json,md,png} and line_quality_fid.png, or where --output says;
those of the documents are in benchmarks/results.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import OUTPUT, Parser, origin, stored_rows, with_ending, write_result
from benchmarks.line_common import BUDGETS, HOST, RECENT, Run, load_tiny
from benchmarks.plots import require_matplotlib, save_budget_plot
from models.gpt_images import GPTGenerator, GPTSampling
from models.line_cache import LineARConfig
from models.line_methods import METHODS
from util.device import pick_device, pick_dtype
from util.errors import UserError, run_main
from util.files import write_json
from util.images import save_png, side_by_side_sheet, to_uint8
from util.report import markdown_table

FULL = "full cache"
PICTURE = [(FULL, "1"), ("linear", "1/4"), ("linear", "1/6"), ("streaming", "1/6"), ("h2o", "1/6")]
EVERY = (",".join(METHODS), ",".join(BUDGETS))  # methods and budgets of the whole table
GRID = HOST.images.grid  # lines, tokens per line
SCORES = (("fid", "FID", ".3f"), ("accuracy", "Accuracy", ".1%"))  # keys, titles, formats
COLUMNS = 10  # images of the picture, one of each class
# In all rows of a file, those that it states.
SAME = ("weights", "images", "kl_images", "seed", "cfg", "top_p", "recent", "device", "dtype")
Plan = tuple[str, str, LineARConfig | None]  # method, budget, configuration


def tables(rows: list[dict], scores: Sequence[tuple[str, str, str]] = SCORES) -> str:
    """Markdown: each score of all methods (rows) at all budgets (columns)."""
    full = next(row for row in rows if row["method"] == FULL)
    parts = []
    for key, title, form in scores:
        cells = {(row["method"], row["budget"]): format(row[key], form) for row in rows}
        body = [[name, *(cells.get((name, b), "-") for b in BUDGETS)] for name in METHODS]
        head = [f"{title} (full cache: {format(full[key], form)})", *BUDGETS]
        parts.append(markdown_table(head, body))
    return "\n".join(parts)


def draw(rows: list[dict], output: Path) -> None:
    """The plot of FID over budget."""
    full = next(row for row in rows if row["method"] == FULL)
    found = {(row["method"], row["budget"]): row["fid"] for row in rows}
    series = {name: [found.get((name, budget)) for budget in BUDGETS] for name in METHODS}
    title, level = "FID over the budget of the cache", (FULL, full["fid"])
    save_budget_plot(with_ending(output, "_fid.png"), title, list(BUDGETS), series, level)


def plans(methods: str, budgets: str, recent: int, grid: tuple[int, int] = GRID) -> list[Plan]:
    """Rows: method, budget, configuration. UserError for a name that the table does not have.

    Raises ValueError for recent lines that do not fit a budget.
    """
    rows: list[Plan] = [(FULL, "1", None)]
    for name in methods.split(","):
        for budget in budgets.split(","):
            if name not in METHODS or budget not in BUDGETS:
                raise UserError(
                    f"there is no row {name} {budget}: methods are {', '.join(METHODS)}, budgets "
                    f"{', '.join(BUDGETS)}"
                )
            config = LineARConfig(BUDGETS[budget], recent=recent, method=name)
            config.plan(grid)
            rows.append((name, budget, config))
    return rows


def measured(
    output: Path,
    about: dict[str, Any],
    wanted: Sequence[Plan],
    make: Callable[[LineARConfig | None], Any],
    measure: Callable[[Any, LineARConfig | None], dict[str, Any]],
) -> list[dict[str, Any]]:
    """The rows of an earlier call with the same SAME, and those of `wanted` that it lacks.

    A row is written when it is finished. make: the images of a configuration; measure: their scores.
    """
    rows = stored_rows(output, {name: about[name] for name in SAME if name in about})
    done = {(row["method"], row["budget"]) for row in rows}
    for method, budget, config in wanted:
        if (method, budget) in done:
            continue
        began = time.perf_counter()
        images = make(config)
        seconds = time.perf_counter() - began
        row = {"method": method, "budget": budget, **measure(images, config)}
        row |= {"images_per_s": about["images"] / seconds, "commit": about["commit"]}
        rows.append(row)
        write_json(output, {"about": about, "rows": rows})
        print(json.dumps(row), flush=True)
    return rows


def picture(
    chosen: Sequence[tuple[str, str]],
    scores: dict[tuple[str, str], str],
    wanted: Sequence[Plan],
    make: Callable[[LineARConfig | None], np.ndarray],
) -> np.ndarray:
    """The same images by those of the chosen rows that have a score: uint8 (H, W, 3)."""
    strips = {}
    for method, budget, config in wanted:
        if (method, budget) in chosen and (method, budget) in scores:
            name = method if config is None else f"{method} {budget}"
            strips[f"{name}: {scores[method, budget]}"] = make(config)
    return side_by_side_sheet(strips, scale=2)


def parse() -> argparse.Namespace:
    parser = Parser("line_quality", __doc__)
    parser.number("num_images", 1000)
    parser.add_argument("--methods", default=EVERY[0], help="rows of the table")
    parser.add_argument("--budgets", default=EVERY[1], help="its columns")
    parser.number("batch", 250, "images per batch")
    parser.number("seed", 1, "as in eval.py", least=0)
    parser.add_argument("--cfg", type=float, default=HOST.sampling.cfg)
    parser.add_argument("--top_p", type=float, default=HOST.sampling.top_p)
    parser.add_argument("--recent", type=int, default=RECENT, help="LineAR's lines")
    parser.device()
    args = parser.read(OUTPUT / "line_quality")
    try:
        args.sampling = GPTSampling(args.cfg, top_p=args.top_p)
        args.plans = plans(args.methods, args.budgets, args.recent)
    except ValueError as error:
        raise UserError(str(error)) from error
    return args


def main() -> None:
    args = parse()
    require_matplotlib()
    output = with_ending(args.output, ".json")
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    model, tokenizer, weights = load_tiny(device, dtype)
    run = Run(args.num_images, args.seed, args.batch)
    about = {
        **origin(),
        "weights": weights,
        "images": args.num_images,
        **{name: getattr(args, name) for name in ("seed", "cfg", "top_p", "recent")},
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }

    def make(config: LineARConfig | None) -> np.ndarray:
        return run.images(model, tokenizer, replace(args.sampling, line_ar=config))

    def measure(images: np.ndarray, config: LineARConfig | None) -> dict[str, Any]:
        lines = LineARConfig.from_argument(config).plan(GRID).budget // GRID[1]
        return {"lines": lines, **run.score(images)}

    rows = measured(output, about, args.plans, make, measure)
    draw(rows, output)
    chosen = [(2 * i + 1) * run.num_images // (2 * COLUMNS) for i in range(COLUMNS)]
    ten = [run.labels[i] for i in chosen], [run.seeds[i] for i in chosen]

    def make_ten(config: LineARConfig | None) -> np.ndarray:
        sampling = replace(args.sampling, line_ar=config)
        generator = GPTGenerator(model, tokenizer, sampling, HOST.images.img_size)
        return to_uint8(generator.generate(ten))

    fid = {(row["method"], row["budget"]): f"FID {row['fid']:.3f}" for row in rows}
    sheet = picture(PICTURE, fid, plans(*EVERY, args.recent), make_ten)
    save_png(with_ending(output, ".png"), sheet)
    write_result(output, {"about": about, "rows": rows}, tables(rows))


if __name__ == "__main__":
    run_main(main)
