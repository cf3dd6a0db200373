"""What each constant of LazyMAR is worth: quality and cost of many settings, beside MAR.

    python -m benchmarks.ablations --group caches --model mar_tiny --dtype bf16
    torchrun --nproc_per_node=8 -m benchmarks.ablations --group all        # mar_huge, 50,000 images

The rows of each group are in benchmarks/ablation_rows.py. A row is a run of eval.py in a folder of its
own below --output_dir: the same command goes on where it stopped, and a row that is finished, also
for another group, is not made again. All flags of eval.py may be given, but for LazyMAR's, which
the rows decide. When all images are there, each row is timed: the rows take turns, --repeats times,
with batches of --timing_bsz, and the fastest counts; on a CPU with one thread the clock counts the
thread's own seconds. Results: RESULTS/ablations_MODEL_GROUP.{json,md} (--results); frontier draws a
plot, too. The last line is one JSON document.
"""

import argparse
import copy
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import engine
from benchmarks.ablation_rows import STEPS, Row, Series, frontier_series, groups, rivals
from benchmarks.common import (
    OUTPUT,
    at_least,
    markdown,
    origin,
    refuse_foreign,
    timed,
    write_result,
    write_text,
)
from benchmarks.memory import SampledBatch, peak_gb
from benchmarks.svg_plot import xy_plot
from models.flops import MARGeometry, image_work
from models.lazy_mar import LazyMARConfig
from models.plan import DecodingPlan
from models.presets import PRESETS
from models.sampler import Sampler
from util import dist, metrics, report
from util.device import can_compile, pick_device, pick_dtype, set_threads
from util.errors import UserError, run_main
from util.evaluation import run as evaluation
from util.files import write_json
from util.flags import make_parser, resolve

GROUPS = tuple(groups(LazyMARConfig(), lambda row, config: None))
TINY_IMAGES = 300
QUALITY = ("", "FID", "IS", "accuracy", "PSNR to MAR, dB")
NOT_PAIRED = {"psnr": None, "identical": None}
CUDA_WARMUPS = 2  # one compiles, one records
PEAK = {True: "of the device", False: "of a whole process, its head with 4 denoising steps"}
COST = ("TFLOPs as published", "executed", "s / image", "speed-up", "peak GB")
# Flags that decide the images of all rows: a result is not overwritten by one of other values.
SETTINGS = ("model", "num_images", "class_num", "img_size", "image_size_eval", "num_sampling_steps")
SETTINGS += ("seed", "seed_mode", "cfg", "cfg_schedule", "temperature")
GEOMETRY = ("img_size", "vae_stride", "patch_size", "vae_embed_dim", "class_num", "buffer_size")
GEOMETRY += ("diffloss_d", "diffloss_w", "num_sampling_steps")
Result = dict[str, object]


class Ablation:
    """The model of a command line, its rows, and what they cost."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        """args: resolved flags. UserError for files that are missing or do not fit."""
        self.args, self.device = args, device
        self.dtype = pick_dtype(args.dtype, device)
        self.model = engine.build_model(args)
        self.weights = engine.load_weights(self.model, args)
        self.model = self.model.to(device).eval()
        self.geometry = MARGeometry.of(self.model)
        self.base = LazyMARConfig(head_interval=PRESETS[args.model].head_interval)
        self.groups = groups(self.base, self.steps_at)
        self.seconds: dict[object, float] = {}

    def tflops(self, row: Row, executed: bool) -> float:
        """Operations for one image, in T."""
        plan = DecodingPlan.create(
            self.model.seq_len, row.num_iter, self.args.cfg, self.args.cfg_schedule
        )
        return image_work(self.geometry, plan, row.config, executed).total / 1e12

    def steps_at(self, row: Row, config: LazyMARConfig | None) -> int | None:
        """Steps with which `config` costs as much as the row, as executed; None if one costs more."""
        cost = self.tflops(row, executed=True)
        costs = {n: self.tflops(Row("", config, n), executed=True) for n in range(1, STEPS + 1)}
        return None if costs[1] > cost else min(costs, key=lambda n: abs(costs[n] - cost))

    def series(self) -> Series:
        """The lines of the frontier."""
        return frontier_series(self.base, self.steps_at)

    def args_of(self, row: Row) -> argparse.Namespace:
        """The flags of eval.py that sample this row."""
        args = copy.copy(self.args)
        args.num_iter, args.lazy_mar = row.num_iter, row.config is not None
        for name, value in (asdict(row.config) if row.config else {}).items():
            setattr(args, name, value)
        return args

    def folder(self, row: Row) -> Path:
        """Where its images lie."""
        sampling = engine.SamplingConfig.from_args(self.args_of(row))
        name = engine.run_name(self.args.model, self.args.num_images, sampling)
        return Path(self.args.output_dir) / name

    def run(self, rows: list[Row], meeting: dist.Meeting) -> float:
        """Make what is missing of all rows; each task once. Returns the seconds of a dry run."""
        tokenizer = engine.open_tokenizer(self.args, self.device)
        seconds = 0.0
        for row in {row.task: row for row in rows}.values():
            if meeting.world.is_main:
                print(f"-- {row.name}: {self.folder(row)}", flush=True)
            results = engine.evaluate(
                self.model,
                tokenizer,
                self.args_of(row),
                meeting,
                self.device,
                self.dtype,
                self.weights,
                redo=False,
            )
            if "method" in results:
                print(report.row(results), flush=True)
            seconds += results.get("seconds", 0.0) if results.get("dry_run") else 0.0
        return seconds

    def peak(self, row: Row) -> float:
        """Peak memory of one batch in GB, measured once per folder, batch size and dtype."""
        batch, device = self.args.eval_bsz, str(self.device)
        about = {"eval_bsz": batch, "dtype": str(self.dtype), "device": device}
        file = self.folder(row) / "memory.json"
        found = json.loads(file.read_text()) if file.exists() else {}
        if not about.items() <= found.items():
            sampling = self.args.model, row.config, row.num_iter, self.args.cfg
            geometry = tuple((name, getattr(self.args, name)) for name in GEOMETRY)
            sampled = SampledBatch(*sampling, batch, self.dtype, device, geometry)
            found = {**about, "peak_gb": peak_gb(sampled)}
            write_json(file, found)
        return found["peak_gb"]

    def measure_peaks(self, rows: list[Row], processes: int) -> None:
        """peak of all rows; on CPUs that many at once, on a GPU one by one."""
        with ThreadPoolExecutor(processes if self.device.type == "cpu" else 1) as pool:
            list(pool.map(self.peak, {row.task: row for row in rows}.values()))

    def measure_seconds(self, rows: list[Row]) -> None:
        """Fill self.seconds: task -> the fastest seconds per image of its turns."""
        unique = list({row.task: row for row in rows}.values())
        on_cuda = self.device.type == "cuda"
        compile = on_cuda and not self.args.no_compile and can_compile(self.device)
        size = self.args.timing_bsz
        labels = [i % self.model.class_num for i in range(size)]
        noise = self.model.image_noise(range(size))
        sampler = Sampler(self.model, self.dtype, compile=compile, graphs=compile)
        turns = [row for _ in range(self.args.repeats) for row in unique]
        for row in tqdm(turns, desc="timing", unit="turn", disable=None):
            sample = partial(
                sampler.sample_tokens,
                size,
                row.num_iter,
                self.args.cfg,
                self.args.cfg_schedule,
                labels,
                self.args.temperature,
                lazy_mar=row.config,
                noise=noise,
            )
            for _ in range(CUDA_WARMUPS if on_cuda else 0):
                sample()
            seconds = timed(sample, self.device) / size
            self.seconds[row.task] = min(seconds, self.seconds.get(row.task, seconds))

    def results(self, group: str) -> list[Result]:
        """The rows of a group, measured."""
        rows = self.groups[group]
        runs = [report.load_run(self.folder(row)) for row in rows]
        found = []
        for row, run in zip(rows, runs, strict=True):
            pair = run is not runs[0] and report.paired(run, runs[0])
            seconds = self.seconds[row.task]
            found.append(
                {
                    "name": row.name,
                    "num_iter": row.num_iter,
                    "lazy_mar": asdict(row.config) if row.config else None,
                    **{key: run.get(key) for key in ("fid", "is_mean", "is_std", "accuracy")},
                    **(report.closeness(run, runs[0]) if pair else NOT_PAIRED),
                    "tflops_published": self.tflops(row, executed=False),
                    "tflops_executed": self.tflops(row, executed=True),
                    "s_per_image": seconds,
                    "speedup": self.seconds[rows[0].task] / seconds,
                    "s_per_image_of_the_run": run.get("sec_per_image"),
                    "peak_gb": self.peak(row),
                    "folder": run["path"].name,
                    "processes": run["processes"],
                    "commit": run["commit"],
                }
            )
        return found

    @property
    def settings(self) -> dict[str, object]:
        """What decides the images of all rows."""
        found = {name: getattr(self.args, name) for name in SETTINGS}
        dtype = str(self.dtype).removeprefix("torch.")
        return {**found, "weights": self.weights, "dtype": dtype, "device": self.device.type}

    def about(self, group: str) -> dict[str, object]:
        """What the numbers of a group travel with."""
        runs = [report.load_run(self.folder(row)) for row in self.groups[group]]
        same = ("seeds", "reference", "eval_bsz", "threads", "processes", "device_name")
        return {
            **origin(),
            "group": group,
            **self.settings,
            **{key: runs[0][key] for key in same},
            "commits of the runs": ", ".join(sorted({str(run["commit"]) for run in runs})),
            "timing": f"batch {self.args.timing_bsz}, the fastest of {self.args.repeats}, rows in turns",
            "peak": f"of a batch of {self.args.eval_bsz}, {PEAK[self.device.type == 'cuda']}",
        }


def table(rows: list[Result]) -> str:
    """Markdown."""
    body = []
    for row in rows:
        inception = f"{row['is_mean']:.2f} ± {row['is_std']:.2f}"
        accuracy = "-" if row["accuracy"] is None else f"{row['accuracy']:.1%}"
        costs = [row["tflops_published"], row["tflops_executed"], row["s_per_image"]]
        quality = [
            row["name"],
            f"{row['fid']:.3f}",
            inception,
            accuracy,
            report.closeness_text(row, ".2f"),
        ]
        body.append([*quality, *costs, f"{row['speedup']:.2f}", row["peak_gb"]])
    return markdown((*QUALITY, *COST), body)


def undominated(rows: list[Result], cost: str) -> list[Result]:
    """Rows that no other beats in both FID and cost, the cheapest first."""
    best, found = float("inf"), []
    for row in sorted(rows, key=lambda row: (row[cost], row["fid"])):
        if row["fid"] < best:
            best = row["fid"]
            found.append(row)
    return found


def default_row(rows: list[Result], base: LazyMARConfig) -> Result:
    """LazyMAR as it is unless told otherwise; `base` is its configuration."""
    default = STEPS, _key(asdict(base))
    return next(row for row in rows if (row["num_iter"], _key(row["lazy_mar"])) == default)


def conclusion(rows: list[Result], base: LazyMARConfig) -> str:
    """What the frontier says, in sentences made from its numbers; `base` is the default row's."""
    lazy = default_row(rows, base)
    lines = [
        f"LazyMAR with {STEPS} steps has FID {lazy['fid']:.3f} at {lazy['tflops_executed']:.3g} TFLOPs "
        f"per image as executed, MAR {rows[0]['fid']:.3f} at {rows[0]['tflops_executed']:.3g}."
    ]
    for name, config in rivals(base).items():
        own = [row for row in rows if _key(row["lazy_mar"]) == _key(config and asdict(config))]
        near = min(own, key=lambda row: abs(row["tflops_executed"] - lazy["tflops_executed"]))
        lines.append(
            f"Nearest to the cost of LazyMAR is, of {name}, the row with {near['num_iter']} steps: FID "
            f"{near['fid']:.3f} at {near['tflops_executed']:.3g} TFLOPs."
        )
    for cost, title in (("tflops_executed", "FLOPs"), ("s_per_image", "seconds")):
        names = "; ".join(row["name"] for row in undominated(rows, cost))
        lines.append(f"No row has both a lower FID and fewer {title} than: {names}.")
    return "\n\n".join(lines) + "\n"


def draw(series: Series, rows: list[Result], base: LazyMARConfig) -> str:
    """SVG of FID over operations and over seconds."""
    found = {(row["num_iter"], _key(row["lazy_mar"])): row for row in rows}
    named = {"MAR": rows[0], "LazyMAR": default_row(rows, base)}
    panels, marks = {}, {}
    for title, cost in (
        ("TFLOPs per image, executed", "tflops_executed"),
        ("s / image", "s_per_image"),
    ):
        panels[title] = {}
        for name, line in series.items():
            of = [found[r.num_iter, _key(r.config and asdict(r.config))] for r in line]
            panels[title][name] = [(row[cost], row["fid"]) for row in of]
        marks[title] = {name: (row[cost], row["fid"]) for name, row in named.items()}
    return xy_plot("Quality over cost", "FID", panels, marks)


def _key(config: Mapping[str, object] | None) -> str:
    return json.dumps(config, sort_keys=True)


def parse_args(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line: --group and --results beside the flags of eval.py."""
    parser = make_parser("eval")
    parser.prog, parser.description = "python -m benchmarks.ablations", __doc__
    parser.add_argument("--group", default="all", help=f"all, or some of {', '.join(GROUPS)}")
    parser.add_argument("--results", default=str(OUTPUT), help="folder of the tables")
    parser.add_argument("--timing_bsz", type=int, help="images of a timed batch (--eval_bsz)")
    parser.add_argument("--repeats", type=int, default=3, help="turns in which each row is timed")
    parser.set_defaults(num_images=None, eval_bsz=None, output_dir="./output_dir/ablations")
    args = parser.parse_args(words)
    constants = [field.name for field in fields(LazyMARConfig)]
    given = [name for name in constants if getattr(args, name) is not None]
    if args.lazy_mar or given or args.num_iter != STEPS:
        name = (given or ["lazy_mar" if args.lazy_mar else "num_iter"])[0]
        raise UserError(f"--{name} is what the rows of an ablation set: leave it away")
    if args.no_save or args.no_score:
        raise UserError(
            "an ablation compares images and scores: leave --no_save and --no_score away"
        )
    small = args.model == "mar_tiny"
    args.num_images = args.num_images or (TINY_IMAGES if small else 50000)
    args.eval_bsz = args.eval_bsz or min(100 if small else 128, args.num_images)
    resolve(args, "eval", PRESETS)
    if args.family != "mar":
        raise UserError(f"--model {args.model} has no LazyMAR: use one of the mar_ models")
    args.timing_bsz = args.eval_bsz if args.timing_bsz is None else args.timing_bsz
    at_least(args, 1, "timing_bsz", "repeats")
    args.group = list(GROUPS) if args.group == "all" else args.group.split(",")
    for name in args.group:
        if name not in GROUPS:
            raise UserError(f"--group {name} is unknown; use all, or some of {', '.join(GROUPS)}")
    return args


def result_paths(args: argparse.Namespace) -> dict[str, Path]:
    """Group -> its files, without suffix."""
    return {n: Path(args.results) / f"ablations_{args.model}_{n}" for n in args.group}


def main() -> None:
    """Command line."""
    args = parse_args()
    set_threads(args.threads)
    world = dist.world_from_env(args.dist_on_itp, args.world_size)
    device = pick_device(args.device, world.local_rank)
    metrics.check_ready(evaluation.request_of(args))
    with dist.Meeting(world, args.dist_url, args.patience) as meeting:
        ablation = Ablation(args, device)
        for path in () if args.overwrite else result_paths(args).values():
            refuse_foreign(path, **ablation.settings)
        rows = [row for name in args.group for row in ablation.groups[name]]
        seconds = ablation.run(rows, meeting)
    if not world.is_main:
        return
    if args.dry_run:
        print(
            json.dumps({"dry_run": True, "rows": len({r.task for r in rows}), "seconds": seconds})
        )
        return
    ablation.measure_peaks(rows, world.size)
    ablation.measure_seconds(rows)
    for name, path in result_paths(args).items():
        found = ablation.results(name)
        document = {"about": ablation.about(name), "rows": found}
        text = table(found)
        path.parent.mkdir(parents=True, exist_ok=True)
        if name == "frontier":
            write_text(path.with_suffix(".svg"), draw(ablation.series(), found, ablation.base))
            document["conclusion"] = conclusion(found, ablation.base)
            text += "\n" + document["conclusion"]
        write_result(path, document, text)


if __name__ == "__main__":
    run_main(main)
