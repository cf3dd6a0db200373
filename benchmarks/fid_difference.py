"""Difference of the FIDs of runs with the same seeds, with a confidence interval.

    python -m benchmarks.fid_difference RUN_OF_MAR RUN_OF_LAZYMAR ... --output output_dir/difference

Runs are folders of eval.py; the others are compared with the first. Runs that differ only by --seed and
--num_images are one set of images. Runs of equal seeds vary together, so the difference varies less than
each FID: the bootstrap (95%) resamples images of both runs together, and within classes if each has 10
images or more.
Features are kept in RUN/features.npz; after that, the images may be deleted. The last line is one JSON
document.
"""

import argparse
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Parser, origin, write_result
from benchmarks.measures import paired_fid, strata
from engine import cli
from util import metrics, report
from util.data.npz import read_arrays
from util.device import set_threads
from util.errors import UserError, run_main
from util.evaluation.conditions import ClassLabels
from util.evaluation.image_source import image_batches, open_source
from util.evaluation.request import ScoreRequest
from util.evaluation.statistics import load_stats
from util.evaluation.sums import Gaussian
from util.files import atomic_path, sha256_of
from util.report import markdown_table

FEATURES = "features.npz"
Run = dict[str, Any]


def key_of(run: Run, request: ScoreRequest) -> str:
    """Digest of what decides the features: the run's configuration and the extractor's weights."""
    weights = metrics.feature_spec(request.features).find_weights(request.features_path)
    manifest = json.loads((run["path"] / "manifest.json").read_text())
    words = json.dumps([manifest["config"], request.features, sha256_of(weights)])
    return hashlib.sha256(words.encode()).hexdigest()


def features_of(run: Run, request: ScoreRequest, device: str) -> np.ndarray:
    """Features (N, d) float32 of a finished run, from RUN/features.npz if they are there.

    UserError if neither they nor the images are.
    """
    folder, key = run["path"], key_of(run, request)
    path = folder / FEATURES
    if path.exists():
        names, remedy = ("key", "features"), "delete it, it is made again"
        found = read_arrays(path, names, "file of features", remedy)
        if str(found["key"]) == key:
            features = found["features"]
            if len(features) != run["num_images"] or not np.isfinite(features).all():
                raise UserError(f"{path} is damaged: {remedy}")
            return features
    if run["images_dir"] is None:
        raise UserError(f"{folder} has no images and no {FEATURES} of them: run eval.py again")
    extractor = metrics.Extractor(request.features, request.features_path, device)
    source = open_source(folder / "images", run["num_images"])
    layer = extractor.spec.feature_layer
    parts = [extractor(images)[layer].cpu().numpy() for _, images in image_batches(source, 64)]
    features = np.concatenate(parts).astype(np.float32)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, features=features, key=np.array(key))
    return features


def pools_of(runs: list[Run]) -> list[list[Run]]:
    """Runs of one configuration but for seed and number of images, in the order of their first."""
    pools: list[tuple[object, list[Run]]] = []
    for run in runs:
        config = json.loads((run["path"] / "manifest.json").read_text())["config"]
        key = {name: value for name, value in config.items() if name not in ("seed", "num_images")}
        for other, pool in pools:
            if key == other and run.get("seed") not in [member.get("seed") for member in pool]:
                pool.append(run)
                break
        else:
            pools.append((key, [run]))
    return [pool for _, pool in pools]


def accuracy_of(pool: list[Run]) -> float | None:
    """Share of right images of all runs together, None if one was not judged."""
    if any(run.get("accuracy") is None for run in pool):
        return None
    images = sum(run["num_images"] for run in pool)
    return float(sum(run["num_images"] * run["accuracy"] for run in pool) / images)


def labels_of(pool: list[Run]) -> np.ndarray | None:
    """Class of each image, None where images have prompts."""
    if pool[0].get("class_num") is None:
        return None
    labels = [ClassLabels(run["class_num"]).of(range(n := run["num_images"]), n) for run in pool]
    return np.concatenate(labels)


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"


def check_paired(run: Run, first: Run) -> None:
    """UserError unless image i of both runs has the same label, seed and weights."""
    for key in report.PAIRED:
        if run.get(key) != first.get(key):
            raise UserError(
                f"{run['path']} has {key} {run.get(key)}, {first['path']} has {first.get(key)}: "
                "runs to compare share their images' labels, seeds and weights"
            )


def parse() -> argparse.Namespace:
    parser = Parser("fid_difference", __doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folders of eval.py, the base first")
    parser.number("resamples", 1000, "bootstrap samples (%(default)s)", least=20)
    add("--features", metavar="NAME", help="feature extractor (the model's)")
    add("--features_path", metavar="FILE", help="its weights")
    add("--fid_stats", metavar="FILE", help="npz with mu and sigma of the reference (the model's)")
    add("--device", default="cpu", help="of the extractor (%(default)s)")
    parser.number("threads", 1)
    args = parser.read()
    if len(args.runs) < 2:
        raise UserError("a single run cannot be compared: give two folders or more")
    return args


def main() -> None:
    args = parse()
    set_threads(args.threads)
    first, *others = pools_of([report.load_run(path) for path in args.runs])
    if not others:
        raise UserError("these runs differ only by seed: give runs of two configurations or more")
    for pool in others:
        if len(pool) != len(first):
            raise UserError(
                f"{first[0]['path']} is one of {len(first)} runs of its configuration, "
                f"{pool[0]['path']} of {len(pool)}: give the same seeds of both"
            )
        for run, base_run in zip(pool, first, strict=True):
            check_paired(run, base_run)
    names = ("features", "features_path", "fid_stats")
    own = {name: value for name in names if (value := getattr(args, name)) is not None}
    request = cli.named(str(first[0]["model"]), **own).request()
    metrics.check_ready(request)
    stats = load_stats(request.stats_path)
    reference = Gaussian(stats.mu, stats.sigma)

    def features(pool: list[Run]) -> np.ndarray:
        return np.concatenate([features_of(run, request, args.device) for run in pool])

    base, labels = features(first), labels_of(first)
    groups = len(strata(len(base), labels))
    rows = []
    for pool in others:
        found = paired_fid(base, features(pool), reference, args.resamples, labels=labels)
        paths = [str(run["path"]) for run in pool]
        rows.append(
            {
                "runs": paths,
                "method": pool[0]["method"],
                "accuracy": accuracy_of(pool),
                **asdict(found),
            }
        )
    about = {
        **origin(),
        "base": [str(run["path"]) for run in first],
        "images": len(base),
        "accuracy": accuracy_of(first),
        "paired": [{key: run.get(key) for key in report.PAIRED} for run in first],
        "cfg": first[0]["cfg"],
        "reference": request.reference,
        "interval": f"95%, {args.resamples} bootstrap samples, runs together",
        "resampled within": f"{groups} classes" if groups > 1 else "all images",
    }
    cells = [[first[0]["method"], f"{rows[0]['base']:.4f}", "", "", percent(accuracy_of(first))]]
    for row in rows:
        interval = f"{row['low']:+.4f} .. {row['high']:+.4f}"
        measured = [f"{row['fid']:.4f}", f"{row['difference']:+.4f}", interval]
        cells.append([row["method"], *measured, percent(row["accuracy"])])
    text = markdown_table(("", "FID", "difference", "95% interval", "accuracy"), cells)
    write_result(args.output, {"about": about, "rows": rows}, text)


if __name__ == "__main__":
    run_main(main)
