"""LazyMAR's constants ranked in minutes, by their error on real images compared with MAR.

    python -m benchmarks.rank --model mar_tiny --images 100 --group all
    python -m benchmarks.rank --model mar_base --cached_path data/imagenet_latents --group token_selection

The rows are those of benchmarks/ablation_rows.py, but only the caches that a group is about are on. Real
latents are decoded in random orders (benchmarks/teacher_forcing.py):

* z error: |z - z of MAR|^2 / |z of MAR|^2 of the tokens decoded now, mean over tokens; conditional
  branch, and unconditional.
* path KL: nats per token between the denoising paths of MAR and of the row, of --kl_images images. Also
  without the last steps, which make most of the sum although their noise is invisible.
* energy distance of the head's samples to MAR's for the same z, of rows with another head (--head_tokens).
* with --samples N, N images are also sampled: Frechet distance of 3x3 latent windows to those of real
  images and to MAR's, and the tear ratio of neighbours decoded together.

`/ default` are ratios to the group's default over the same images. Rows are written as they are done, to
RESULTS/rank_MODEL_GROUP.json (--results): the same command resumes. The last line of each
group is one JSON document.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.ablation_rows import MAR as MAR_ROW
from benchmarks.ablation_rows import STEPS, Row, groups
from benchmarks.common import OUTPUT, Parser, listed, origin, stored_rows, with_ending, write_result
from benchmarks.measures import (
    Estimate,
    energy_distance,
    frechet_distance,
    noise_to_signal,
    patch_gaussian,
    steps_of_positions,
    tear_ratio,
)
from benchmarks.real_images import RealImages, real_images
from benchmarks.teacher_forcing import ForcedImages, Teacher
from engine import cli
from engine.base import Loaded
from engine.mar import PRESETS, MARHost, mar_host
from models.flops import MARGeometry, image_work
from models.lazy_mar import CACHES, LazyMARConfig
from models.mar import MAR
from models.plan import DecodingPlan
from models.sampler import Sampler
from util.device import device_name, pick_device, pick_dtype, set_threads
from util.errors import UserError, run_main
from util.evaluation.batches import image_seed
from util.evaluation.conditions import image_label
from util.files import write_json
from util.report import markdown_table
from util.shapes import HELD_OUT_START
from util.tiny.assets import DEFAULT_IMAGES

TRANSFORMER, HEAD = ("token", "condition"), ("head",)
# Group -> the caches that are on, so that no other blurs what its constants do.
ISOLATED = {
    "caches": CACHES,
    **dict.fromkeys(("token_selection", "keep", "probe_layer", "interval", "warmup"), TRANSFORMER),
    **dict.fromkeys(("head_interval", "head_skip"), HEAD),
}
# Held-out pictures of the shapes data set, behind those of the FID statistics.
FIRST_PICTURE = HELD_OUT_START + DEFAULT_IMAGES["stats"]
REFERENCE_PICTURES = 2000  # of the Frechet distance to real images
VISIBLE_NOISE = 0.05  # of tokens of variance 1; models.linear_tokenizer's decoder expects as much
HEAD_SAMPLES = 128  # of each fixed z
# Flags in which results must not differ, for the rows of one to be taken from another.
SETTINGS = ("model", "images", "kl_images", "head_tokens", "samples", "num_iter", "seed")
Result = dict[str, Any]


def rows_of(group: str) -> list[Row]:
    """The rows of a group that have LazyMAR; the default is among them."""
    base = LazyMARConfig().with_caches(ISOLATED[group])
    rows = groups(base, lambda row, config: None)[group]
    return [
        row for row in rows if row.config is not None and row.config.with_caches(()) != row.config
    ]


def default_of(group: str) -> LazyMARConfig:
    """The configuration that the others of a group are compared with."""
    return LazyMARConfig().with_caches(ISOLATED[group])


class Ranking:
    """Measures configurations of one model at the same images."""

    def __init__(
        self,
        host: MARHost,
        loaded: Loaded,
        args: argparse.Namespace,
        images: RealImages,
        dtype: torch.dtype,
    ) -> None:
        """Runs MAR, which all are compared with, on the model's device."""
        assert isinstance(loaded.model, MAR)
        self.sampler = Sampler(loaded.model, dtype)
        self.geometry = MARGeometry.from_model(loaded.model)
        model = self.sampler.model
        assert isinstance(model, MAR)
        plan = DecodingPlan.create(model.seq_len, args.num_iter, host.sampling.cfg)
        self.model, self.plan, self.args, self.cfg = model, plan, args, host.sampling.cfg
        seeds = [image_seed(args.seed, i) for i in range(args.images)]
        cuts = [(0, args.kl_images), (args.kl_images, args.images)]
        parts = [
            slice(start, min(start + args.batch, stop))
            for first, stop in cuts
            for start in range(first, stop, args.batch)
        ]
        batches = [
            ForcedImages.create(self.model, images.latents[p], images.labels[p], seeds[p])
            for p in parts
        ]
        self.teacher = Teacher(self.model, plan, batches, -(-args.kl_images // args.batch))
        self.visible = noise_to_signal(self.model.diffloss.gen_diffusion) >= VISIBLE_NOISE
        self.head = None
        if args.head_tokens:
            self.head = self.teacher.head_samples(None, args.head_tokens, HEAD_SAMPLES)
        self.plain_work = image_work(self.geometry, plan, None, executed=True).total
        if args.samples:
            self.plain_samples, self.steps = self.sample(None)
            real = real_images(
                host, loaded.tokenizer, HELD_OUT_START, REFERENCE_PICTURES, args.cached_path
            )
            self.real = patch_gaussian(real.latents)

    def sample(self, config: LazyMARConfig | None) -> tuple[Tensor, Tensor]:
        """Latents (N, C, H, W) of eval.py's labels and seeds, and the step of each token (N, L)."""
        args, latents, steps = self.args, [], []
        for start in range(0, args.samples, args.batch):
            indices = range(start, min(start + args.batch, args.samples))
            noise = self.model.image_noise([image_seed(args.seed, i) for i in indices])
            labels = [image_label(i, args.samples, self.model.class_num) for i in indices]
            found = self.sampler.sample_tokens(
                len(indices), args.num_iter, self.cfg, labels=labels, lazy_mar=config, noise=noise
            )
            latents.append(found.float().cpu())
            steps.append(steps_of_positions(self.plan, noise.orders))
        return torch.cat(latents), torch.cat(steps)

    def sampled(self, latents: Tensor) -> Result:
        """Measures of sampled images, this row's (N, C, H, W)."""
        ours, side = patch_gaussian(latents), self.model.grid_size
        tokens = self.model.patchify(latents).unflatten(1, (side, side))
        return {
            "patch_frechet_real": frechet_distance(ours, self.real),
            "patch_frechet_mar": frechet_distance(ours, patch_gaussian(self.plain_samples)),
            "tear_ratio": tear_ratio(tokens, self.steps.unflatten(1, (side, side))),
        }

    def mar(self) -> Result:
        """MAR's own row: the energy distance of two halves of its samples, which is the floor."""
        found: Result = {"tflops_executed": self.plain_work / 1e12, "fewer_operations": 1.0}
        if self.head is not None:
            halves = self.head.chunk(2, dim=1)
            found["energy"] = _mean_energy(*halves)
        if self.args.samples:
            found |= self.sampled(self.plain_samples)
        return found

    def measure(self, config: LazyMARConfig) -> Result:
        """All measures of one configuration."""
        found = self.teacher.compare(config)
        work = image_work(self.geometry, self.plan, config, executed=True).total
        result: Result = {
            "tflops_executed": work / 1e12,
            "fewer_operations": self.plain_work / work,
        }
        per_step = {"z_error": found.z_error, "kl": found.kl.sum(-1)}
        per_step["kl_visible"] = found.kl[..., self.visible].sum(-1)
        if found.z_error_unconditional is not None:
            per_step["z_error_unconditional"] = found.z_error_unconditional
        for name, by_step in per_step.items():
            images = self.teacher.over_tokens(by_step)
            result[name] = asdict(Estimate.of(images))
            result[f"{name}_by_step"] = by_step.mean(0).tolist()
            result[f"{name}_by_image"] = images.tolist()
        result["kl_by_noise"] = self.teacher.over_tokens(found.kl.mean(0).T).tolist()
        if config.head_cache and self.head is not None:
            samples = self.teacher.head_samples(config, self.args.head_tokens, HEAD_SAMPLES)
            result["energy"] = _mean_energy(samples, self.head)
        if self.args.samples:
            result |= self.sampled(self.sample(config)[0])
        return result


def _mean_energy(x: Tensor, y: Tensor) -> float:
    """Mean energy distance of samples (tokens, samples, c) of the same z."""
    return sum(energy_distance(a, b) for a, b in zip(x, y, strict=True)) / len(x)


def ratio(row: Result, default: Result, name: str) -> str | None:
    """A measure over that of the default, of the same images; None where the default makes no error."""
    key = f"{name}_by_image"
    if key not in row or not any(default[key]):
        return None
    if row is default:
        return "1"
    ours, base = (torch.tensor(r[key]) for r in (row, default))
    found = Estimate.ratio(ours, base)
    return f"{found.mean:.3g} ± {found.error:.2g}"


def table(rows: Sequence[Result], default: Result) -> str:

    def with_error(name: str) -> Callable[[Result], object]:
        return lambda row: name in row and f"{row[name]['mean']:.3g} ± {row[name]['error']:.2g}"

    visible = f"path KL above noise {VISIBLE_NOISE:g}, nats"
    columns: dict[str, Callable[[Result], object]] = {
        "": lambda row: row["name"],
        "fewer operations": lambda row: f"{row['fewer_operations']:.2f}x",
        "z error": with_error("z_error"),
        "z error / default": lambda row: ratio(row, default, "z_error"),
        "z error, unconditional": with_error("z_error_unconditional"),
        "path KL, nats": with_error("kl"),
        visible: with_error("kl_visible"),
        "the same / default": lambda row: ratio(row, default, "kl_visible"),
    }
    plain = {
        "energy": "energy distance of the head",
        "patch_frechet_real": "patch FD to real",
        "patch_frechet_mar": "patch FD to MAR",
        "tear_ratio": "tear ratio",
    }
    measured = [name for name in plain if any(name in row for row in rows)]
    body = [
        [*(cell(row) or None for cell in columns.values()), *(row.get(name) for name in measured)]
        for row in rows
    ]
    return markdown_table([*columns, *(plain[name] for name in measured)], body)


def key_of(config: LazyMARConfig | None) -> str:
    """Names a configuration, or MAR, in a file of results."""
    return json.dumps(config and asdict(config))


def parse() -> argparse.Namespace:
    parser = Parser("rank", __doc__)
    add, number = parser.add_argument, parser.number
    add("--model", default="mar_tiny", choices=tuple(PRESETS))
    add("--resume", metavar="FILE", help="other weights than the model's own")
    add("--group", default="all", help=f"all, or some of {','.join(ISOLATED)}")
    number("images", 100, "real images (%(default)s)", least=2)  # one has no standard error
    number("kl_images", 25, "those whose path KL is measured (%(default)s)", least=2)
    number("head_tokens", 0, "fixed z of the energy distance, 0: none", least=0)
    number("samples", 0, "images to sample of each row, 0: none", least=0)
    number("num_iter", STEPS, "decoding steps (%(default)s)")
    add("--cfg", type=float, help="guidance scale (the model's)")
    number("seed", 1, "of pictures, orders and noise (%(default)s)", least=0)
    number("batch", 25, "images at once (%(default)s)")
    add("--cached_path", type=Path, metavar="DIR", help="real latents by main_cache.py")
    parser.device()
    number("threads", 1)
    add("--results", type=Path, default=OUTPUT, metavar="DIR", help="folder of the tables")
    args = parser.checked()
    args.kl_images = min(args.kl_images, args.images)
    if args.cached_path is None and PRESETS[args.model].get("features") != "shapes":
        raise UserError(
            f"--cached_path DIR is missing: real latents for {args.model}, by main_cache.py"
        )
    args.group = list(ISOLATED) if args.group == "all" else listed(args.group, "group", ISOLATED)
    return args


def main() -> None:
    args = parse()
    set_threads(args.threads)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    own = {name: value for name in ("resume", "cfg") if (value := getattr(args, name)) is not None}
    host = mar_host(cli.named(args.model, **own).host())
    loaded = host.load(device)
    first = FIRST_PICTURE + args.seed * args.images
    images = real_images(host, loaded.tokenizer, first, args.images, args.cached_path)
    settings = {
        **{name: getattr(args, name) for name in SETTINGS},
        "weights": loaded.weights,
        "cfg": host.sampling.cfg,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "data": images.name,
    }
    paths = {name: args.results / f"rank_{args.model}_{name}" for name in args.group}
    known: dict[str, Result] = {}
    for path in paths.values():
        for stored in stored_rows(path, settings):
            lazy_mar = stored["lazy_mar"] and LazyMARConfig(**stored["lazy_mar"])
            known[key_of(lazy_mar)] = stored
    wanted = {key_of(row.config) for name in args.group for row in (MAR_ROW, *rows_of(name))}
    args.results.mkdir(parents=True, exist_ok=True)
    if not wanted <= known.keys():
        ranking = Ranking(host, loaded, args, images, dtype)
    about = {**origin(), **settings, "device_name": device_name(device)}
    for name, path in paths.items():
        rows: list[Result] = []
        document: dict[str, object] = {
            "about": {**about, "caches": ", ".join(ISOLATED[name])},
            "rows": rows,
        }
        for row in (MAR_ROW, *rows_of(name)):
            key = key_of(row.config)
            if key not in known:
                found = ranking.measure(row.config) if row.config else ranking.mar()
                known[key] = {"lazy_mar": row.config and asdict(row.config), **found}
                known[key]["commit"] = about["commit"]
            rows.append({**known[key], "name": row.name})
            write_json(with_ending(path, ".json"), document)
            print(f"{name}: {row.name} ({len(known)} of {len(wanted)} measured)", flush=True)
        places = [row.config for row in rows_of(name)]
        write_result(path, document, table(rows, rows[1 + places.index(default_of(name))]))


if __name__ == "__main__":
    run_main(main)
