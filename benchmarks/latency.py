"""Seconds per image of MAR, LazyMAR and the presets at the real sizes, beside the limits of the hardware.

    python -m benchmarks.latency --models mar_huge --batches 1,8,64,128          # on a GPU: bf16
    python -m benchmarks.latency --models mar_base --batches 1 --threads 1 --device cpu

Weights are random, so nothing has to be downloaded. After a warm-up the modes take turns; the median
counts. Limits use rates measured in the same run: `arithmetic` is operations over the rate of a large
matrix product; `with reads` adds the head's weights, read at every denoising step. Peak memory: CUDA's
count, or on a CPU that of a new process with a head of 4 steps (--memory). With one CPU thread, CPU
seconds are counted. The last line is one JSON document.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.common import (
    Parser,
    batch_sizes,
    default_dtype,
    listed,
    matrix_rate,
    origin,
    read_rate,
    take_turns,
    write_result,
)
from benchmarks.mar_work import MODELS, MODES, build, count_work
from benchmarks.memory import SampledBatch, peak_gb
from models.fast_mar import FastMARConfig
from models.sampler import Sampler
from util.device import DTYPES, can_compile, device_name, pick_device
from util.errors import run_main
from util.report import markdown_table


def task_of(mode: str, args: argparse.Namespace) -> FastMARConfig:
    """The settings of a mode; --num_iter sets the decoding steps of all."""
    task = MODES[mode]
    return task if args.num_iter is None else replace(task, num_iter=args.num_iter)


def sampling(sampler: Sampler, mode: str, batch: int, args: argparse.Namespace) -> Callable:
    """A call that samples images 0 .. batch-1, each of its own class, other classes at each call."""
    first = itertools.count(step=batch)
    noise = sampler.model.image_noise(range(batch)).to(sampler.device)

    def call() -> Tensor:
        start = next(first)
        labels = [(start + i) % sampler.model.class_num for i in range(batch)]
        return sampler.sample_tokens(
            batch, cfg=args.cfg, labels=labels, noise=noise, **task_of(mode, args).arguments()
        )

    return call


def measure(
    name: str, batch: int, args: argparse.Namespace, ceilings: tuple[float, float]
) -> list[dict[str, object]]:
    """One row per mode."""
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    options = {"compile": args.compile, "graphs": args.compile}
    model = build(name, device)
    # One sampler per mode: it forgets its recorded graphs when it samples something else.
    calls = {m: sampling(Sampler(model, dtype, **options), m, batch, args) for m in args.modes}
    title = f"{name} {args.dtype} batch {batch} "
    times, peaks = take_turns(calls, device, args.warmup, args.repeats, title)
    rows = []
    for mode in args.modes:
        task = task_of(mode, args)
        work = count_work(name, task, args.cfg, dtype.itemsize)
        seconds = statistics.median(times[mode])
        arithmetic, with_reads = work.limits(batch, *ceilings)
        if args.memory and device.type == "cpu":
            settings = args.cfg, batch, dtype, args.device
            peaks[mode] = peak_gb(SampledBatch(name, task, *settings))
        rows.append(
            {
                "model": name,
                "dtype": args.dtype,
                "batch": batch,
                "mode": mode,
                "num_iter": task.num_iter,
                "s_per_image": seconds / batch,
                "all_s": times[mode],
                "speedup": statistics.median(times[args.modes[0]]) / seconds,
                "tflop_per_image": work.flops / 1e12,
                "gflop_per_s": batch * work.flops / seconds / 1e9,
                "arithmetic_limit_s": arithmetic / batch,
                "over_arithmetic": seconds / arithmetic,
                "limit_with_reads_s": with_reads / batch,
                "over_limit": seconds / with_reads,
                "peak_gb": peaks[mode],
            }
        )
    return rows


def parse() -> argparse.Namespace:
    parser = Parser("latency", __doc__)
    parser.add_argument("--models", default="mar_base", help=f"of {','.join(MODELS)}")
    parser.add_argument("--batches", default="1", help="images per batch")
    parser.add_argument("--modes", default="plain,lazy,balanced,fast", help=f"of {','.join(MODES)}")
    parser.number("num_iter", None, "decoding steps (64; balanced 40, fast 32)")
    parser.add_argument("--cfg", type=float, default=3.25)
    parser.number("warmup", None, "runs that do not count (CUDA: 3, CPU: 0)", least=0)
    parser.number("repeats", 3)
    parser.number("threads", None, "CPU threads (PyTorch's choice if not given)")
    parser.add_argument("--no_compile", action="store_true", help="as eval.py's")
    parser.add_argument("--memory", action="store_true", help="peak memory of CPU runs as well")
    parser.device()
    args = parser.read()
    device = pick_device(args.device)
    args.dtype = args.dtype or default_dtype(device)
    if args.warmup is None:
        args.warmup = 3 if device.type == "cuda" else 0
    args.models = listed(args.models, "models", MODELS)
    args.modes = listed(args.modes, "modes", MODES)
    args.batches = batch_sizes(args.batches)
    args.compile = not args.no_compile and can_compile(device, show=True)
    args.device = str(device)
    return args


def main() -> None:
    args = parse()
    device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = []
    with torch.no_grad():
        ceilings = matrix_rate(device, DTYPES[args.dtype]), read_rate(device)
        for name in args.models:
            for batch in args.batches:
                rows += measure(name, batch, args, ceilings)
    about = {
        **origin(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "matrix_gflop_per_s": ceilings[0] / 1e9,
        "read_gb_per_s": ceilings[1] / 1e9,
        **{name: getattr(args, name) for name in ("compile", "cfg")},
        "seeds": "0 .. batch - 1; weights: torch.manual_seed(0)",
    }
    head = ["model", "dtype", "batch", "mode", "num_iter", "s_per_image", "speedup"]
    head += ["tflop_per_image", "arithmetic_limit_s", "over_arithmetic"]
    head += ["limit_with_reads_s", "over_limit", "peak_gb"]
    table = markdown_table(head, [[row[key] for key in head] for row in rows])
    write_result(args.output, {"about": about, "rows": rows}, table)


if __name__ == "__main__":
    run_main(main)
