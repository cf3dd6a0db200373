"""Generate images with MAR (LazyMAR) or LlamaGen (LineAR), and score them: FID, Inception Score.

    python eval.py --model mar_tiny --num_images 100 --lazy_mar            # the bundled models
    python eval.py --model gpt_tiny --num_images 100 --line_ar --line_budget 1/4
    torchrun --nproc_per_node=2 eval.py --num_images 50000 --eval_bsz 128 --num_iter 64 --lazy_mar
    python eval.py --score_only output_dir/mar_huge-lazy_mar-iter64-cfg3.25-50000 --metrics fid,isc,pr

Image i has a seed of its own, so the same command resumes, and runs of MAR and LazyMAR are paired
image by image. The last line on stdout is one JSON document. Images, contact sheet and results.json
lie in a folder of their own below --output_dir.
"""

import argparse
import json
from pathlib import Path

import torch

import engine
from models.presets import PRESETS
from util import checkpoint, dist, metrics, report
from util.device import pick_device, pick_dtype, set_threads
from util.errors import run_main
from util.evaluation import run as evaluation
from util.evaluation.run_folder import RunDir
from util.flags import SCORED_AS, make_parser, resolve


def parse_args() -> argparse.Namespace:
    """The command line; what --score_only is not told is as in the last call of the run."""
    parser = make_parser("eval")
    args = parser.parse_args()
    manifest = RunDir(args.score_only).manifest() if args.score_only else {}
    if manifest:
        before = manifest["calls"][-1]["arguments"]
        parser.set_defaults(**{name: before[name] for name in SCORED_AS if name in before})
        args = parser.parse_args()
    resolve(args, "eval", PRESETS)
    return args


def main() -> None:
    """Command line."""
    args = parse_args()
    set_threads(args.threads)
    world = dist.world_from_env(args.dist_on_itp, args.world_size)
    device = pick_device(args.device, world.local_rank)
    with dist.Meeting(world, args.dist_url, args.patience) as meeting:
        results = score(args, meeting, device) if args.score_only else run(args, meeting, device)
    if world.is_main:
        if "method" in results:
            print(report.row(results))
        print(json.dumps(results))


def score(
    args: argparse.Namespace, meeting: dist.Meeting, device: torch.device
) -> dict[str, object]:
    """--score_only: the scores of images that are there."""
    request = evaluation.request_of(args)
    metrics.check_ready(request)
    folder = Path(args.score_only)
    return evaluation.score_only(folder, request, args.num_images, args.class_num, meeting, device)


def run(args: argparse.Namespace, meeting: dist.Meeting, device: torch.device) -> dict[str, object]:
    """Make images and score them."""
    dtype = pick_dtype(args.dtype, device)
    engine.sampling_of(args)
    if not args.no_score:  # before minutes of loading and hours of sampling
        metrics.check_ready(evaluation.request_of(args))
    checkpoint.find_checkpoint(args.resume)
    model = engine.build_model(args)
    weights = engine.load_weights(model, args)
    model = model.to(device).eval()
    tokenizer = engine.open_tokenizer(args, device)
    return engine.evaluate(model, tokenizer, args, meeting, device, dtype, weights)


if __name__ == "__main__":
    run_main(main)
