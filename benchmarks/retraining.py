"""Repeated trainings of the bundled model compared: their scores, and their losses step by step.

    python -m benchmarks.retraining

Reads results of scripts/train_tiny.sh from benchmarks/results: log.jsonl of each training, renamed
retraining_NAME.jsonl; results.json of 1,000 images, renamed retraining_NAME.json; and the bundled model's
score from tiny_1000. Writes retraining.md there.
"""

import argparse
import json
from pathlib import Path
from statistics import median

from benchmarks.common import RESULTS, origin, write_text
from util.errors import UserError, run_main
from util.report import markdown_table

BUNDLED = "tiny_1000_mar_tiny-mar.json"
RUNS = {"one": "again, one process", "two": "again, two processes"}
SAME = ("num_images", "num_iter", "cfg", "dtype", "eval_bsz")


def read_losses(path: Path) -> dict[int, float]:
    """Step -> mean loss of the steps up to it since the line before."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def differences(first: dict[int, float], second: dict[int, float]) -> list[float]:
    """|a - b| / mean(a, b) at every step that both have. UserError if they have different ones."""
    if not first or first.keys() != second.keys():
        raise UserError("the two trainings have logged different steps: they do not compare")
    return [2 * abs(first[s] - second[s]) / (first[s] + second[s]) for s in first]


def report(folder: Path) -> str:
    """The document. UserError for files that are missing or do not compare."""
    try:
        scores = {"the bundled file": json.loads((folder / BUNDLED).read_text())}
        losses = [read_losses(folder / f"retraining_{name}.jsonl") for name in RUNS]
        for name, title in RUNS.items():
            scores[title] = json.loads((folder / f"retraining_{name}.json").read_text())
    except OSError as error:
        raise UserError(f"{error.filename} is needed to compare: {error.strerror}") from error
    first = scores["the bundled file"]
    for title, score in scores.items():
        for key in SAME:
            if score[key] != first[key]:
                raise UserError(
                    f"{title}: {key} is {score[key]}, of the bundled file {first[key]}: "
                    "score both alike"
                )
    rows = [
        [
            title,
            f"{score['fid']:.3f}",
            f"{score['is_mean']:.2f} ± {score['is_std']:.2f}",
            f"{score['accuracy']:.1%}",
            score["commit"],
        ]
        for title, score in scores.items()
    ]
    apart = differences(*losses)
    steps = list(losses[0])
    commands = "\n".join(f"    {c}" for c in sorted({s["command"] for s in scores.values()}))
    return f"""{markdown_table(("", "FID", "IS", "accuracy", "commit"), rows)}
{first["num_images"]:,} images each, {first["method"]}, {first["num_iter"]} steps, \
guidance {first["cfg"]:g}, {first["dtype"]} on {first["device"]}, batch {first["eval_bsz"]}, scored by

{commands}

with the file in the place of the bundled one (hence the + of the commits). The other two were trained
from nothing, after both bundled files of weights were deleted, the second on the first one's latents, by

    PROCESSES=1 OUT=output_dir/one scripts/train_tiny.sh
    PROCESSES=2 OUT=output_dir/two scripts/train_tiny.sh

Loss, {len(steps)} points from step {steps[0]} to {steps[-1]}, each the mean since the one before: \
the two differ by {median(apart):.1%} in the median and by {max(apart):.1%} at most.

Written by `{origin()["command"]}` from {BUNDLED}, retraining_*.json and retraining_*.jsonl.
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.retraining", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the files")
    args = parser.parse_args()
    text = report(args.results)
    write_text(args.results / "retraining.md", text)
    print(text)


if __name__ == "__main__":
    run_main(main)
