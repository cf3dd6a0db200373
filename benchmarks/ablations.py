"""Ablations of LazyMAR's constants: quality and cost of many settings, compared with MAR.

    python -m benchmarks.ablations --group caches --model mar_tiny --dtype bf16
    torchrun --nproc_per_node=8 -m benchmarks.ablations --group all        # mar_huge, 50,000 images

The rows of each group are in benchmarks/ablation_rows.py. Each row is a run of eval.py in its own folder
below --output_dir, so the same command resumes, and groups share rows. All flags of eval.py are accepted
except those of LazyMAR, which the rows set. Runs of the bundled model also get the Frechet distance of
3x3 windows of latents to held-out pictures, and its difference to MAR's with a 95% interval. Then every
row is timed --repeats times with batches of --timing_bsz, rows in turns; the fastest counts (CPU seconds
if there is one thread). Results: RESULTS/ablations_MODEL_GROUP.{json,md} (--results), and a plot for
frontier. The last line is one JSON document.
"""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm

from benchmarks.ablation_rows import STEPS, Row, Series, frontier_series, groups
from benchmarks.common import (
    OUTPUT,
    origin,
    timed,
    write_result,
)
from benchmarks.frontier import Result, conclusion, draw
from benchmarks.memory import SampledBatch, peak_gb
from benchmarks.patches import PatchDistance
from benchmarks.plots import require_matplotlib
from engine import cli
from engine.mar import MARHost, mar_host
from engine.mar_settings import BEYOND_LAZYMAR
from engine.run import evaluate
from models.flops import MARGeometry, image_work
from models.head_config import HeadConfig
from models.lazy_mar import LazyMARConfig
from models.mar import MAR
from models.order import OrderConfig
from models.sampler import Sampler
from util import dist, metrics, report
from util.errors import UserError, run_main
from util.evaluation.config import EvaluationConfig
from util.evaluation.request import ScoreRequest
from util.files import read_json, write_json
from util.report import markdown_table

GROUPS = tuple(groups(LazyMARConfig(), lambda row, config: None))
TINY_IMAGES = 300
QUALITY = ("", "FID", "IS", "accuracy", "PSNR to MAR, dB")
PATCHES = ("patch FD", "patch FD - MAR's, 95%")
NOT_PAIRED = {"psnr": None, "identical": None}
CUDA_WARMUPS = 2  # one compiles, one records
PEAK = {True: "of the device", False: "of a whole process, its head with 4 denoising steps"}
COST = ("TFLOPs as published", "TFLOPs executed", "s / image", "speed-up", "peak GB")


@dataclass(frozen=True)
class Request:
    """The command line. groups: names of ablations; results: folder of the tables."""

    host: MARHost
    settings: EvaluationConfig
    scoring: ScoreRequest
    place: cli.Place
    arguments: dict[str, object]
    groups: list[str]
    results: Path
    timing_bsz: int
    repeats: int

    def paths(self) -> dict[str, Path]:
        """Group -> its files, without suffix."""
        return {name: self.results / f"ablations_{self.host.model}_{name}" for name in self.groups}


class Ablation:
    """The model of a command line, its rows, and what they cost."""

    def __init__(self, request: Request) -> None:
        """UserError for files that are missing or do not fit."""
        self.request, self.device = request, request.place.device
        self.dtype = request.place.execution.dtype
        self.loaded = request.host.load(self.device)
        self.model = cast(MAR, self.loaded.model)
        self.geometry = MARGeometry.from_model(self.model)
        lazy_mar = request.host.sampling.lazy_mar
        assert lazy_mar is not None
        self.base = lazy_mar
        self.groups = groups(self.base, self.steps_at)
        self.seconds: dict[object, float] = {}
        self.patches: dict[object, Result] = {}

    def tflops(self, row: Row, executed: bool) -> float:
        """Operations for one image, in T."""
        plan = self.host_of(row).sampling.plan(self.model.seq_len)
        return image_work(self.geometry, plan, row.config, executed, row.head).total / 1e12

    def steps_at(self, row: Row, config: LazyMARConfig | None) -> int | None:
        """Steps with which `config` costs as much as the row, as executed; None if one costs more."""
        cost = self.tflops(row, executed=True)
        costs = {n: self.tflops(Row("", config, n), executed=True) for n in range(1, STEPS + 1)}
        return None if costs[1] > cost else min(costs, key=lambda n: abs(costs[n] - cost))

    def series(self) -> Series:
        """The lines of the frontier."""
        return frontier_series(self.base, self.steps_at)

    def host_of(self, row: Row) -> MARHost:
        return self.request.host.with_sampling(
            num_iter=row.num_iter,
            lazy_mar=row.config,
            head=None if row.head == HeadConfig() else row.head,
            order=None if row.order == OrderConfig() else row.order,
        )

    def folder(self, row: Row) -> Path:
        """Its run folder."""
        settings = self.request.settings
        return Path(settings.output_dir) / self.host_of(row).run_name(settings.num_images)

    def run(self, rows: list[Row], rendezvous: dist.Rendezvous) -> float:
        """Make what is missing of all rows; each task once. Returns the seconds of a dry run.

        UserError, before anything is made, for a row that the model cannot sample.
        """
        request, seconds = self.request, 0.0
        unique = {row.task: row for row in rows}.values()
        for row in unique:
            try:
                self.tflops(row, executed=True)
            except ValueError as error:
                raise UserError(f"the row {row.name!r} cannot be sampled: {error}") from error
        for row in unique:
            if rendezvous.world.is_main:
                print(f"-- {row.name}: {self.folder(row)}", flush=True)
            results = evaluate(
                self.host_of(row),
                self.loaded,
                request.settings,
                request.scoring,
                request.place.execution,
                rendezvous,
                request.arguments,
                redo=False,
            )
            if "method" in results:
                print(report.row(results), flush=True)
            seconds += results.get("seconds", 0.0) if results.get("dry_run") else 0.0
        return seconds

    def peak(self, row: Row) -> float:
        """Peak memory of one batch in GB, measured once per folder, batch size and dtype."""
        batch, device = self.request.settings.eval_bsz, str(self.device)
        about = {"eval_bsz": batch, "dtype": str(self.dtype), "device": device}
        file = self.folder(row) / "memory.json"
        found = read_json(file, dict, "remove it") if file.exists() else {}
        if not about.items() <= found.items() or not isinstance(found.get("peak_gb"), float):
            host = self.host_of(row)
            sampling = host.model, row.task, host.sampling.cfg
            geometry = tuple(asdict(host.geometry).items())
            sampled = SampledBatch(*sampling, batch, self.dtype, device, geometry)
            found = {**about, "peak_gb": peak_gb(sampled)}
            write_json(file, found)
        return float(found["peak_gb"])

    def measure_peaks(self, rows: list[Row], processes: int) -> None:
        """peak of all rows; on CPUs that many at once, on a GPU one by one."""
        with ThreadPoolExecutor(processes if self.device.type == "cpu" else 1) as pool:
            list(pool.map(self.peak, {row.task: row for row in rows}.values()))

    def measure_seconds(self, rows: list[Row]) -> None:
        """Fill self.seconds: task -> the fastest seconds per image of its turns."""
        request = self.request
        unique = list({row.task: row for row in rows}.values())
        fast = request.place.execution.fast()
        size, sampling = request.timing_bsz, request.host.sampling
        labels = [i % self.model.class_num for i in range(size)]
        noise = self.model.image_noise(range(size))
        sampler = Sampler(self.model, self.dtype, compile=fast, graphs=fast)
        turns = [row for _ in range(request.repeats) for row in unique]
        for row in tqdm(turns, desc="timing", unit="turn", disable=None):
            sample = partial(
                sampler.sample_tokens,
                size,
                row.num_iter,
                sampling.cfg,
                sampling.cfg_schedule,
                labels,
                sampling.temperature,
                lazy_mar=row.config,
                head=row.head,
                order=row.order,
                noise=noise,
            )
            for _ in range(CUDA_WARMUPS if self.device.type == "cuda" else 0):
                sample()
            seconds = timed(sample, self.device) / size
            self.seconds[row.task] = min(seconds, self.seconds.get(row.task, seconds))

    def measure_patches(self, rows: list[Row]) -> None:
        """Fill self.patches: task -> patch Frechet distance, and its difference to MAR's, the first row."""
        base, tokenizer = report.load_run(self.folder(rows[0])), self.loaded.tokenizer
        distance = PatchDistance(tokenizer, self.request.host.tokenizer.scale(tokenizer), base)
        unique = {row.task: row for row in rows}
        for task, row in tqdm(unique.items(), desc="patches", unit="row", disable=None):
            run = base if task == rows[0].task else report.load_run(self.folder(row))
            found = distance.compare(run) if report.paired(run, base) else None
            if found:
                interval = [found.difference, found.low, found.high] if run is not base else None
                self.patches[task] = {"patch_frechet": found.fid, "patch_difference": interval}

    def results(self, group: str) -> list[Result]:
        """The rows of a group, measured."""
        rows = self.groups[group]
        runs = [report.load_run(self.folder(row)) for row in rows]
        found = []
        for row, run in zip(rows, runs, strict=True):
            pair = run is not runs[0] and report.same_pictures(run, runs[0])
            seconds = self.seconds[row.task]
            found.append(
                {
                    "name": row.name,
                    "num_iter": row.num_iter,
                    "lazy_mar": asdict(row.config) if row.config else None,
                    "head": asdict(row.head),
                    "order": row.order.kind,
                    **{key: run.get(key) for key in ("fid", "is_mean", "is_std", "accuracy")},
                    **(report.closeness(run, runs[0]) if pair else NOT_PAIRED),
                    **self.patches.get(row.task, {}),
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
        host, settings = self.request.host, self.request.settings
        dtype = str(self.dtype).removeprefix("torch.")
        return {
            "model": host.model,
            "num_images": settings.num_images,
            "class_num": host.class_num,
            "img_size": host.geometry.img_size,
            "num_sampling_steps": host.geometry.num_sampling_steps,
            "seed": settings.seed,
            "seed_mode": settings.seed_mode,
            "cfg": host.sampling.cfg,
            "cfg_schedule": host.sampling.cfg_schedule,
            "temperature": host.sampling.temperature,
            "weights": self.loaded.weights,
            "dtype": dtype,
            "device": self.device.type,
        }

    def about(self, group: str) -> dict[str, object]:
        """What is recorded with the numbers of a group."""
        request = self.request
        runs = [report.load_run(self.folder(row)) for row in self.groups[group]]
        same = ("seeds", "reference", "eval_bsz", "threads", "processes", "device_name")
        return {
            **origin(),
            "group": group,
            **self.settings,
            **{key: runs[0][key] for key in same},
            "commits of the runs": ", ".join(sorted({str(run["commit"]) for run in runs})),
            "timing": f"batch {request.timing_bsz}, the fastest of {request.repeats}, rows in turns",
            "peak": f"of a batch of {request.settings.eval_bsz}, {PEAK[self.device.type == 'cuda']}",
        }


def table(rows: list[Result]) -> str:
    body, patches = [], any("patch_frechet" in row for row in rows)
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
        if patches:
            difference = row.get("patch_difference")
            interval = difference and "{:+.3f} ({:+.3f} .. {:+.3f})".format(*difference)
            quality += [row.get("patch_frechet"), interval]
        body.append([*quality, *costs, f"{row['speedup']:.2f}", row["peak_gb"]])
    return markdown_table((*QUALITY, *(PATCHES if patches else ()), *COST), body)


def parse(words: Sequence[str] | None = None) -> Request:
    """The command line: --group and --results beside the flags of eval.py."""
    parser = cli.make_parser("ablations", __doc__.splitlines()[0])
    parser.add_flag("group", f"all, or some of {', '.join(GROUPS)} [all]", metavar="NAME,...")
    parser.add_flag("results", f"folder of the tables [{OUTPUT}]", metavar="DIR")
    parser.add_flag("timing_bsz", "images of a timed batch; default --eval_bsz", type=int)
    parser.add_flag("repeats", "turns in which each row is timed [3]", type=int)
    flags = parser.parse(words)
    set_by_rows = "is set by the rows of an ablation"
    flags.refuse((LazyMARConfig, *BEYOND_LAZYMAR), set_by_rows)
    for name in ("lazy_mar", "num_iter"):
        if name in flags.given:
            raise UserError(f"--{name} {set_by_rows}: remove it")
    for name in ("no_save", "no_score"):
        if flags.given.get(name):
            raise UserError(f"an ablation compares images and scores: remove --{name}")
    group, results, timing_bsz, repeats = flags.take("group", "results", "timing_bsz", "repeats")
    selection = cli.select(flags, "ablations")
    flags.given["lazy_mar"] = True  # for the base of the rows
    host = mar_host(selection.host())
    small = selection.model == "mar_tiny"
    num_images = flags.given.setdefault("num_images", TINY_IMAGES if small else 50000)
    flags.given.setdefault("eval_bsz", min(100 if small else 128, num_images))
    settings = flags.build(EvaluationConfig)
    names = list(GROUPS) if group in (None, "all") else group.split(",")
    for name in names:
        if name not in GROUPS:
            raise UserError(f"--group {name} is unknown; use all, or some of {', '.join(GROUPS)}")
    timing_bsz = settings.eval_bsz if timing_bsz is None else timing_bsz
    repeats = 3 if repeats is None else repeats
    for name, value in (("timing_bsz", timing_bsz), ("repeats", repeats)):
        if value < 1:
            raise UserError(f"--{name} is {value}; it must be at least 1")
    return Request(
        host=host,
        settings=settings,
        scoring=selection.request(),
        place=cli.place(flags),
        arguments=flags.resolved,
        groups=names,
        results=Path(results or OUTPUT),
        timing_bsz=timing_bsz,
        repeats=repeats,
    )


def main() -> None:
    request = parse()
    place = request.place
    if "frontier" in request.groups:
        require_matplotlib()
    metrics.check_ready(request.scoring)
    with place.rendezvous() as rendezvous:
        ablation = Ablation(request)
        rows = [row for name in request.groups for row in ablation.groups[name]]
        seconds = ablation.run(rows, rendezvous)
    if not place.world.is_main:
        return
    if request.settings.dry_run:
        print(
            json.dumps({"dry_run": True, "rows": len({r.task for r in rows}), "seconds": seconds})
        )
        return
    if request.scoring.features == "shapes":
        ablation.measure_patches(rows)
    ablation.measure_peaks(rows, place.world.size)
    ablation.measure_seconds(rows)
    # Before the first file is written, which may be part of the repository.
    about = {name: ablation.about(name) for name in request.groups}
    for name, path in request.paths().items():
        found = ablation.results(name)
        document: dict[str, Any] = {"about": about[name], "rows": found}
        text = table(found)
        if name == "frontier":
            draw(path.with_suffix(".png"), ablation.series(), found, ablation.base)
            document["conclusion"] = conclusion(found, ablation.base)
            text += "\n" + document["conclusion"]
        write_result(path, document, text)


if __name__ == "__main__":
    run_main(main)
