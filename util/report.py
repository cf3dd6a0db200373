"""Compare runs of eval.py: a Markdown table, and a sheet of the same seeds side by side.

    python -m util.report demo/mar_tiny-mar-* demo/mar_tiny-lazy_mar_* --sheet demo/sheet.png

The first run is what the others are compared with: speed-up, and PSNR between images of the same seeds.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from util.errors import UserError, run_main
from util.files import atomic_path
from util.images import png_name, read_image, save_png, side_by_side_sheet

PAIRED = ("weights", "num_images", "class_num", "seed", "model")  # what makes image i the same task
SHEET_COLUMNS = 10
SHEET_SCALE = 2


def load_run(path: Path) -> dict[str, object]:
    """Configuration and results of a run folder. UserError if it is not a finished run."""
    run: dict[str, object] = {"path": path}
    for name in ("config.json", "results.json"):
        try:
            run |= json.loads((path / name).read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is no finished run of eval.py: {name}: {error}") from error
    return run


def mean_psnr(run: dict[str, object], first: dict[str, object]) -> float | None:
    """Mean PSNR in dB between images of the same index; None if the runs are not paired."""
    if any(run.get(key) != first.get(key) for key in PAIRED):
        return None
    values = []
    for index in range(int(run["num_images"])):
        a, b = (
            read_image(Path(r["path"]) / "images" / png_name(index)).astype(np.float64)
            for r in (run, first)
        )
        error = np.square(a - b).mean()
        values.append(10 * np.log10(255**2 / max(error, 1e-10)))
    return float(np.mean(values))


def table(runs: list[dict[str, object]]) -> str:
    """Markdown: one row per run."""
    rows = [
        "| | FID | IS | accuracy | s / image | speed-up | PSNR to the first, dB |",
        "|---|---|---|---|---|---|---|",
    ]
    first = runs[0]
    for run in runs:
        seconds, base = run.get("sec_per_image"), first.get("sec_per_image")
        speedup = base / seconds if seconds and base else None
        psnr = None if run is first else mean_psnr(run, first)
        inception = "-"
        if "is_mean" in run:
            inception = f"{run['is_mean']:.2f} ± {run['is_std']:.2f}"
        cells = [
            str(run["method"]),
            _number(run.get("fid"), ".3f"),
            inception,
            _number(run.get("accuracy"), ".1%"),
            _number(seconds, ".3f"),
            _number(speedup, ".2f"),
            _number(psnr, ".1f"),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    about = (
        f"{first['model']}, {first['num_images']} images, {first['num_iter']} steps, "
        f"guidance {first['cfg']:g}, {first['dtype']} on {first['device']}, "
        f"{first['processes']} process(es) of {first['threads']} CPU thread(s), batch {first['eval_bsz']}, "
        f"torch {first['torch']}, commit {first['commit']}\n\n"
        + "\n".join(f"    {run['command']}" for run in runs)
    )
    return "\n".join([*rows, "", about])


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def sheet(runs: list[dict[str, object]]) -> np.ndarray:
    """uint8 (H, W, 3): one row per run, the same images spread over the classes in each."""
    count = min(int(run["num_images"]) for run in runs)
    columns = min(SHEET_COLUMNS, count)
    chosen = [i * count // columns for i in range(columns)]
    rows = {}
    for run in runs:
        folder = Path(run["path"]) / "images"
        label = str(run["method"])
        if seconds := run.get("sec_per_image"):
            label += f", {seconds:.2f} s per image"
        rows[label] = np.stack([read_image(folder / png_name(i)) for i in chosen])
    return side_by_side_sheet(rows, scale=SHEET_SCALE)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        "python -m util.report",
        description="Compare finished runs of eval.py; the first is the base.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="DIR", help="run folders")
    parser.add_argument(
        "--sheet", type=Path, metavar="FILE.png", help="write the images side by side"
    )
    parser.add_argument("--table", type=Path, metavar="FILE.md", help="write the table")
    args = parser.parse_args()
    runs = [load_run(path) for path in args.runs]
    text = table(runs)
    if args.table:
        with atomic_path(args.table) as temporary:
            temporary.write_text(text + "\n")
    if args.sheet:
        save_png(args.sheet, sheet(runs))
        print(f"the same seeds side by side: {args.sheet}\n")
    print(text)


if __name__ == "__main__":
    run_main(main)
