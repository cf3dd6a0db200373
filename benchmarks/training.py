"""Images per second of a training step, compared with a plainly written step.

    python -m benchmarks.training --model mar_large --batch 64                   # on a GPU: bf16
    python -m benchmarks.training --model mar_base --batch 4 --device cpu --dtype bf16 --memory

Weights and latents are random. After a warm-up the rows take turns; the median counts. Step k masks the
same number of tokens in every row. --memory adds each row's peak, measured in a new process: CUDA's
count, or on a CPU that of the whole process (Linux). The last line is one JSON document.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable

import torch

from benchmarks.common import Parser, default_dtype, listed, origin, take_turns, write_result
from benchmarks.eager_training import EagerTraining
from benchmarks.mar_work import MODELS, build
from benchmarks.memory import peak_of
from models import mar
from models.noise import TrainingNoise
from util.device import DTYPES, device_name, pick_device
from util.errors import run_main
from util.report import markdown_table
from util.training import step as training
from util.training.ema import EMA
from util.training.optimizer import LRSchedule, make_optimizer

ROWS = ("eager", "ours", "checkpointing", "compile", "compile + checkpointing")
LR = 1e-4


def stepper(row: str, args: argparse.Namespace) -> Callable[[], object]:
    """A call that takes the next training step of a fresh model, as `row` says."""
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    model = build(args.model, device, grad_checkpointing="checkpointing" in row)
    model.requires_grad_(True).train()
    torch.manual_seed(1)
    side = model.grid_size * model.patch_size
    latents = torch.randn(args.batch, model.vae_embed_dim, side, side, device=device)
    labels = torch.randint(model.class_num, (args.batch,), device=device)

    count = itertools.count()

    def next_noise() -> TrainingNoise:
        return model.training_noise(args.batch, training.step_seed(0, next(count)))

    if row == "eager":
        eager = EagerTraining(model, LR, dtype)
        return lambda: eager.step(latents, labels, model.seq_len - next_noise().known)
    if "compile" in row:
        mar.compile_for_training(model)
    state = training.TrainState(
        model,
        model,
        EMA(model, 0.9999),
        make_optimizer(model, LR, weight_decay=0.02),
        torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
    )
    config = training.StepConfig(LRSchedule(LR), 3.0, 0, 0, device, dtype)
    return lambda: training.train_step(state, [(latents, labels, next_noise())], LR, config)


def two_steps(row: str, args: argparse.Namespace) -> None:
    """Two steps, whose peak is measured: the second has the optimizer's moments."""
    torch.set_num_threads(args.threads)
    step = stepper(row, args)
    for _ in range(2):
        step()


def measure(args: argparse.Namespace) -> list[dict[str, object]]:
    """One dictionary per row."""
    peaks: dict[str, float | None] = dict.fromkeys(args.rows)
    if args.memory:
        peaks = {row: peak_of(args.device, two_steps, row, args) for row in args.rows}
    steps = {row: stepper(row, args) for row in args.rows}
    title = f"{args.model} {args.dtype} batch {args.batch} "
    times, _ = take_turns(steps, torch.device(args.device), args.warmup, args.repeats, title)
    first = statistics.median(times[args.rows[0]])
    return [
        {
            "model": args.model,
            "dtype": args.dtype,
            "batch": args.batch,
            "step": row,
            "images_per_s": args.batch / statistics.median(times[row]),
            "speedup": first / statistics.median(times[row]),
            "all_s": times[row],
            "peak_gb": peaks[row],
        }
        for row in args.rows
    ]


def parse() -> argparse.Namespace:
    parser = Parser("training", __doc__)
    parser.add_argument("--model", default="mar_base", choices=MODELS)
    parser.number("batch", 4, "images per step")
    parser.add_argument("--rows", default="eager,ours,checkpointing", help=f"of {','.join(ROWS)}")
    parser.number("warmup", 1, "steps that do not count", least=0)
    parser.number("repeats", 5)
    parser.number("threads", 1, "CPU threads")
    parser.add_argument("--memory", action="store_true", help="peak memory as well")
    parser.device()
    args = parser.read()
    device = pick_device(args.device)
    args.dtype = args.dtype or default_dtype(device)
    args.rows, args.device = listed(args.rows, "rows", ROWS), str(device)
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    rows = measure(args)
    about = {
        **origin(),
        "device": device_name(torch.device(args.device)),
        "threads": args.threads,
        "seeds": "weights: torch.manual_seed(0); latents: 1; noise of step k: (0, k)",
    }
    head = ["model", "dtype", "batch", "step", "images_per_s", "speedup", "peak_gb"]
    table = markdown_table(head, [[row[key] for key in head] for row in rows])
    write_result(args.output, {"about": about, "rows": rows}, table)


if __name__ == "__main__":
    run_main(main)
