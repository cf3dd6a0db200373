"""Compare runs of eval.py: a Markdown table, and a sheet of the same seeds side by side.

    python -m util.report demo/mar_tiny-mar-* demo/mar_tiny-lazy_mar_* --sheet demo/sheet.png

The others are compared with the first run: speed-up, and PSNR between images of the same seeds (and LPIPS
if the package lpips is installed).
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from util.errors import UserError, run_main
from util.files import read_json, write_json, write_text
from util.images import png_name, read_image, save_png, side_by_side_sheet

# Image i is the same task in runs that agree in these.
PAIRED = ("weights", "num_images", "class_num", "prompts", "seed", "seed_mode", "model")
# Settings that a row names if the runs differ in them.
REPORTED_KEYS = ("num_iter", "cfg", "cfg_schedule", "temperature", "top_k", "top_p")
FEWEST_FOR_FID = 200  # images; below, FID and IS are noise and the table leaves them out
SHEET_COLUMNS = 10
SHEET_SCALE = 2
# Optional columns, shown if any run has them: key of the results, heading, format.
ON_REQUEST = (
    ("lpips", "LPIPS to the first", ".3f"),
    ("sfid", "sFID", ".3f"),
    ("kid_mean", "KID", ".5f"),
    ("precision", "precision", ".3f"),
    ("recall", "recall", ".3f"),
)
# Entries that every run must have, and entries that must be numbers if present.
NEEDED = (
    *("model", "method", "num_images", "num_iter", "cfg", "eval_bsz", "images_dir"),
    *("dtype", "device", "processes", "threads", "torch", "commit", "command"),
)
NUMBERS = (
    *("fid", "is_mean", "is_std", "accuracy", "sec_per_image", "num_images", "cfg"),
    *(key for key, _, _ in ON_REQUEST),
)
Json = Mapping[str, Any]


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table that ends in a line break; floats with three significant digits, None as an empty cell."""

    def text(cell: object) -> str:
        if cell is None:
            return ""
        return f"{cell:.3g}" if isinstance(cell, float) and cell < 1000 else str(cell)

    body = [f"| {' | '.join(map(text, row))} |\n" for row in (head, *rows)]
    return "".join([body[0], "|" + "---|" * len(head) + "\n", *body[1:]])


def load_run(path: Path) -> dict[str, Any]:
    """Configuration and results of a run folder. UserError if it is not a finished run."""
    parts = []
    for name in ("manifest.json", "results.json"):
        try:
            parts.append(read_json(path / name, dict, "finish or repeat the run"))
        except UserError as error:
            raise UserError(f"{path} is not a finished run of eval.py: {error}") from error
    manifest, results = parts
    if not isinstance(manifest.get("config"), dict):
        raise UserError(f"{path} is not a finished run of eval.py: manifest.json has no config")
    run = {"path": path, **manifest["config"], **results}
    for name in NEEDED:
        if name not in run:
            raise UserError(f"{path} is not a finished run of eval.py: it does not say its {name}")
    for name in NUMBERS:
        if not isinstance(run.get(name), (int, float, type(None))):
            raise UserError(
                f"{path} has the {name} {run[name]!r}, which is not a number: score it again"
            )
    if not run["num_images"] or run["num_images"] < 1:
        raise UserError(
            f"{path / 'results.json'} states num_images {run['num_images']}: score it again"
        )
    return run


def paired(run: Json, first: Json) -> bool:
    """Whether image i of both runs has the same label, seed and weights, and both have images."""
    same = all(run.get(key) == first.get(key) for key in PAIRED)
    return same and None not in (run["images_dir"], first["images_dir"])


def same_pictures(run: Json, first: Json) -> bool:
    """Whether image i of both runs shows the same picture: paired, and decoded in the same order."""
    return paired(run, first) and run.get("order") == first.get("order")


def image_pairs(run: Json, first: Json) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(image, image of the first) of two paired runs, uint8 (H, W, 3)."""
    for index in range(int(run["num_images"])):
        name = png_name(index)
        ours, theirs = (read_image(Path(r["path"]) / "images" / name) for r in (run, first))
        yield ours, theirs


def closeness(run: Json, first: Json) -> dict[str, float | None]:
    """psnr: mean over the images of two paired runs that differ, None if none does; identical: share of
    the others."""
    values = [None if np.array_equal(a, b) else psnr(a, b) for a, b in image_pairs(run, first)]
    differing = [value for value in values if value is not None]
    mean = float(np.mean(differing)) if differing else None
    return {"psnr": mean, "identical": 1 - len(differing) / len(values)}


def closeness_text(found: Json, form: str) -> str:
    """A cell: the PSNR, and the share of identical images if there are any."""
    if found["psnr"] is None:
        return "identical" if found["identical"] else "-"
    same = f" ({found['identical']:.0%} identical)" if found["identical"] else ""
    return format(found["psnr"], form) + same


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of uint8 images (H, W, 3); equal ones have 148 dB."""
    error = np.square(a.astype(np.float64) - b).mean()
    return 10 * np.log10(255**2 / max(error, 1e-10))


def make_lpips() -> Callable[[np.ndarray, np.ndarray], float] | None:
    """LPIPS (Zhang et al. 2018, AlexNet) of uint8 images, None if it is not available."""
    try:
        import lpips  # optional; takes seconds and needs weights
        import torch

        network = lpips.LPIPS(net="alex", verbose=False).eval()
    except (ImportError, OSError) as error:
        print(f"note: no LPIPS ({str(error).splitlines()[0]})", file=sys.stderr)
        return None

    @torch.no_grad()
    def measure(a: np.ndarray, b: np.ndarray) -> float:
        first, second = (torch.from_numpy(x).permute(2, 0, 1)[None] / 127.5 - 1 for x in (a, b))
        return network(first, second).item()

    return measure


def cells(run: Json) -> list[str]:
    """Cells of one run: method, FID, IS, accuracy, seconds per image."""
    inception = "-"
    if run.get("is_mean") is not None:
        inception = f"{run['is_mean']:.2f} ± {run['is_std']:.2f}"
    return [
        str(run.get("label", run["method"])),
        _number(run.get("fid"), ".3f"),
        inception,
        _number(run.get("accuracy"), ".1%"),
        _number(run.get("sec_per_image"), ".3f"),
    ]


def row(run: Json) -> str:
    return f"| {' | '.join(cells(run))} |"


def compare(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each run, and beside the first its speedup, closeness and lpips (None where there is none).

    label: the method, and those settings in which the runs differ.
    """
    first = runs[0]
    pairs = [run is not first and same_pictures(run, first) for run in runs]
    lpips = make_lpips() if any(pairs) else None
    reported = [key for key in REPORTED_KEYS if any(run.get(key) != first.get(key) for run in runs)]
    found = []
    for run, pair in zip(runs, pairs, strict=True):
        label = ", ".join([run["method"], *(f"{key} {run[key]}" for key in reported if key in run)])
        seconds, base = run.get("sec_per_image"), first.get("sec_per_image")
        beside: dict[str, Any] = {
            "speedup": base / seconds if seconds and base else None,
            **(closeness(run, first) if pair else {"psnr": None, "identical": None}),
            "lpips": None,
        }
        if pair and lpips:
            beside["lpips"] = float(np.mean([lpips(*images) for images in image_pairs(run, first)]))
        found.append(run | beside | {"label": label})
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one row per run of compare."""
    first = rows[0]
    extra = [column for column in ON_REQUEST if any(run.get(column[0]) is not None for run in rows)]
    headings = ["", "FID", "IS", "accuracy", "s / image", "speed-up", "PSNR to the first, dB"]
    headings += [heading for _, heading, _ in extra]
    body = []
    for run in rows:
        more = [_number(run["speedup"], ".2f"), closeness_text(run, ".1f")]
        more += [_number(run.get(key), form) for key, _, form in extra]
        body.append([*cells(run), *more])
    if all(int(run["num_images"]) < FEWEST_FOR_FID for run in rows):
        headings, *body = ([name, *others] for name, _, _, *others in (headings, *body))
    about = (
        f"{first['model']}, {first['num_images']} images, {first['num_iter']} steps, "
        f"guidance {first['cfg']:g}, {first['dtype']} on {first['device']}, "
        f"{first['processes']} process(es) of {first['threads']} CPU thread(s), batch {first['eval_bsz']}, "
        f"torch {first['torch']}, commit {first['commit']}\n\n"
        + "\n".join(f"    {run['command']}" for run in rows)
    )
    references = {run["reference"] for run in rows if run.get("reference")}
    if len(references) > 1:
        about = f"The scores are not comparable: {' and '.join(sorted(references))}.\n\n{about}"
    return f"{markdown_table(headings, body)}\n{about}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def sheet(runs: list[dict[str, Any]]) -> np.ndarray:
    """uint8 (H, W, 3): one row per run, the same images spread over the classes in each."""
    count = min(int(run["num_images"]) for run in runs)
    columns = min(SHEET_COLUMNS, count)
    chosen = [i * count // columns for i in range(columns)]
    rows = {}
    for run in runs:
        folder = Path(run["path"]) / "images"
        label = str(run["label"])
        if seconds := run.get("sec_per_image"):
            label += f", {seconds:.2f} s per image"
        rows[label] = np.stack([read_image(folder / png_name(i)) for i in chosen])
    return side_by_side_sheet(rows, scale=SHEET_SCALE)


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m util.report",
        description="Compare finished runs of eval.py; the first is the base.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="DIR", help="run folders")
    parser.add_argument("--sheet", type=Path, metavar="FILE.png", help="write images side by side")
    parser.add_argument("--table", type=Path, metavar="FILE.md", help="write the table")
    parser.add_argument("--json", type=Path, metavar="FILE.json", help="write all numbers")
    args = parser.parse_args()
    runs = compare([load_run(path) for path in args.runs])
    text = table(runs)
    if args.table:
        write_text(args.table, text + "\n")
    if args.json:
        write_json(args.json, {"rows": [run | {"path": str(run["path"])} for run in runs]})
    if args.sheet:
        save_png(args.sheet, sheet(runs))
        print(f"the same seeds side by side: {args.sheet}\n")
    print(text)


if __name__ == "__main__":
    run_main(main)
