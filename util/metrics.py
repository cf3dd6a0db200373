"""Scores and reference statistics of images: the parts of util.evaluation for scripts, and a command.

python -m util.metrics make_stats --data_path DIR --output FILE.npz
"""

import argparse
from pathlib import Path

from util.device import pick_device
from util.errors import UserError, run_main
from util.evaluation.extractors import (
    FEATURES,
    Extractor,
    FeatureSpec,
    feature_spec,
    register_features,
)
from util.evaluation.scores import Scorer, check_ready, make_stats, score

__all__ = [
    "Extractor",
    "FeatureSpec",
    "Scorer",
    "check_ready",
    "feature_spec",
    "make_stats",
    "register_features",
    "score",
]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m util.metrics", description=__doc__)
    command = parser.add_subparsers(dest="command", required=True).add_parser(
        "make_stats", help="reference statistics of a folder of images, for FID"
    )
    add = command.add_argument
    add("--data_path", required=True, help="folder of images or of class folders")
    add("--features", default="inception-v3-compat", help=f"one of: {', '.join(FEATURES)}")
    add("--features_path", help="weights of the extractor")
    add("--output", help="npz file to write; without it the folder's name and .npz, here")
    add("--img_size", type=int, help="crop to this size as for training")
    add("--keep_features", action="store_true", help="keep all features too, for kid and pr")
    add("--device", help="default: cuda where there is one, else cpu")
    add("--batch_size", type=int, default=64)
    args = parser.parse_args()
    output = Path(args.output or f"{Path(args.data_path).absolute().name}.npz")
    if args.output is None and output.exists():
        raise UserError(f"{output} exists: say --output FILE.npz")
    stats = make_stats(
        args.data_path,
        args.features,
        args.features_path,
        output,
        pick_device(args.device),
        args.batch_size,
        args.img_size,
        args.keep_features,
    )
    print(f"{output}: {stats.features}, {stats.num_images} images, {stats.mu.size} features")


if __name__ == "__main__":
    run_main(main)
