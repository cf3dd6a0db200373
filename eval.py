"""Generate images with MAR (LazyMAR) or LlamaGen (LineAR), and score them: FID, Inception Score.

    python eval.py --model mar_tiny --num_images 100 --lazy_mar            # the bundled models
    python eval.py --model gpt_tiny --num_images 100 --line_ar --line_budget 1/4
    torchrun --nproc_per_node=2 eval.py --num_images 50000 --eval_bsz 128 --num_iter 64 --lazy_mar

Image i has a seed of its own, so the same command resumes, and runs of MAR and LazyMAR are paired
image by image. The last line on stdout is one JSON document. Images, contact sheet and results.json
lie in a folder of their own below --output_dir.
"""

import json

import torch

import engine
from models.presets import PRESETS
from util import dist, metrics
from util.device import pick_device, pick_dtype
from util.errors import run_main
from util.flags import make_parser, resolve


def main() -> None:
    """Command line."""
    args = make_parser("eval").parse_args()
    resolve(args, "eval", PRESETS)
    if args.threads:
        torch.set_num_threads(args.threads)
    world = dist.world_from_env(args.dist_on_itp, args.world_size)
    device = pick_device(args.device, world.local_rank)
    dtype = pick_dtype(args.dtype, device)
    engine.sampling_of(args)
    if not args.no_score:  # before minutes of loading and hours of sampling
        metrics.check_ready(args.features, args.features_path, args.fid_stats)
    model = engine.build_model(args)
    weights = engine.load_weights(model, args)
    model = model.to(device).eval()
    tokenizer = engine.open_tokenizer(args, device)

    dist.start(world, device, args.dist_url)
    try:
        results = engine.evaluate(model, tokenizer, args, world, device, dtype, weights)
    finally:
        dist.stop(world)
    if world.is_main:
        print(json.dumps(results))


if __name__ == "__main__":
    run_main(main)
