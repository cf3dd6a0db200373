"""From MAR written straightforwardly to ours, one technique per row.

    python -m benchmarks.waterfall --model mar_huge --batch 128               # on a GPU: bf16
    python -m benchmarks.waterfall --model mar_base --dtype bf16 --threads 1 --device cpu

Each row adds one technique to those above it. Rows take turns; the median counts. Weights are random.
The last line is one JSON document.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks import eager_mar
from benchmarks.common import Parser, origin, take_turns, write_result
from benchmarks.mar_work import MODELS, build
from models.decoding import Decoding, MakeDenoiser
from models.lazy_mar import LazyMARConfig
from models.mar import MAR
from models.noise import ImageNoise
from models.plan import DecodingPlan
from models.sampler import Sampler
from util.device import autocast, device_name, pick_device, pick_dtype
from util.errors import run_main
from util.report import markdown_table

Call = Callable[[], object]


def rows_of(
    model: MAR, plan: DecodingPlan, labels: list[int], noise: ImageNoise, dtype: torch.dtype
) -> dict[str, Call]:
    """Name of each row -> a call that samples the batch that way."""
    device, bsz = noise.orders.device, len(labels)

    def autocasted(call: Call) -> Call:
        def run() -> None:
            with autocast(device, dtype):
                call()

        return run

    def ours(
        config: LazyMARConfig | None, fast: bool, denoiser: MakeDenoiser | None = None
    ) -> Call:
        on_cuda = fast and device.type == "cuda"
        sampler = Sampler(model, dtype, compile=on_cuda)
        decoding = Decoding(
            sampler.model, bsz, plan, config, 1.0,
            compile=on_cuda, graphs=on_cuda, denoiser=denoiser,
        )  # fmt: skip
        return fresh(decoding)

    def fresh(decoding: Decoding) -> Call:
        def run() -> None:
            decoding.first_z.clear()  # step 0 counts
            decoding(labels, noise)

        return run

    in_order = Decoding(model, bsz, plan, None, 1.0, denoiser=eager_mar.EagerDenoiser)
    rows = {
        "eager: masks, raster order": autocasted(
            lambda: eager_mar.sample_tokens(model, plan, labels, noise)
        ),
        "+ planned: decoding order, last block where needed": autocasted(fresh(in_order)),
        "+ weights cast and laid out once": ours(
            None, fast=False, denoiser=eager_mar.EagerDenoiser
        ),
        "+ adaLN ahead of the denoising steps": ours(None, fast=False),
    }
    if device.type == "cuda":
        rows["+ torch.compile and CUDA graphs"] = ours(None, fast=True)
    off = LazyMARConfig(condition_cache=False, head_cache=False)
    rows["+ LazyMAR: token cache"] = ours(off, fast=True)
    rows["+ condition cache"] = ours(replace(off, condition_cache=True), fast=True)
    rows["+ head cache"] = ours(LazyMARConfig(), fast=True)
    return rows


def parse() -> argparse.Namespace:
    parser = Parser("waterfall", __doc__)
    parser.add_argument("--model", default="mar_base", choices=MODELS)
    parser.number("batch", 1)
    parser.number("num_iter", 64)
    parser.add_argument("--cfg", type=float, default=3.25)
    parser.number("warmup", None, "runs that do not count (CUDA: 3, CPU: 0)", least=0)
    parser.number("repeats", 3)
    parser.number("threads", None, "CPU threads (PyTorch's choice if not given)")
    parser.device()
    return parser.read()


def main() -> None:
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    warmup = (3 if device.type == "cuda" else 0) if args.warmup is None else args.warmup

    model = build(args.model, device)
    plan = DecodingPlan.create(model.seq_len, args.num_iter, args.cfg)
    labels = [i % model.class_num for i in range(args.batch)]
    noise = model.image_noise(range(args.batch))
    calls = rows_of(model, plan, labels, noise, dtype)
    times, _ = take_turns(calls, device, warmup, args.repeats)
    seconds = {name: statistics.median(t) / args.batch for name, t in times.items()}
    first = next(iter(seconds.values()))
    rows, before = [], first
    for name, s in seconds.items():
        rows.append([name, s, before / s, first / s])
        before = s
    head = ["technique", "s_per_image", "gain", "against eager"]
    about = {
        **origin(),
        **{name: getattr(args, name) for name in ("model", "batch", "num_iter", "cfg")},
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "seeds": "0 .. batch - 1; weights: torch.manual_seed(0)",
    }
    document = {"about": about, "rows": [dict(zip(head, r, strict=True)) for r in rows]}
    write_result(args.output, document, markdown_table(head, rows))


if __name__ == "__main__":
    run_main(main)
