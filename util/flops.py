"""Counts the operations that LazyMAR's paper states, for all models and modes, by part and by cache.

    python -m util.flops

No weights are needed. `published` counts the authors' algorithm, `executed` the operations computed
here (models/flops.py). The last line is one JSON document of the published count:
{model: {"plain": TFLOPs per image, "lazy": ..., "balanced": ..., "fast": ..., "ratio": plain / lazy}}.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from engine import cli
from engine.mar import mar_host
from engine.published import tflops_at_64
from models.fast_mar import PRESETS, FastMARConfig
from models.flops import MARGeometry, Work, image_work
from models.lazy_mar import CACHES, LazyMARConfig
from models.plan import DecodingPlan
from util.errors import UserError, run_main
from util.evaluation.run_folder import provenance
from util.files import write_text
from util.report import markdown_table

MODELS = ("mar_base", "mar_large", "mar_huge", "mar_tiny")
LAZY = LazyMARConfig()


@dataclass(frozen=True)
class Mode:
    """A row: how an image is sampled, and whether it is guided."""

    config: FastMARConfig
    guided: bool = True


def modes(num_iter: int) -> dict[str, Mode]:
    """Rows by name: MAR and LazyMAR with `num_iter` steps, and the presets with their own."""
    without = {f"no {name} cache": LAZY.with_caches(set(CACHES) - {name}) for name in CACHES}
    alone = {f"{name} cache alone": LAZY.with_caches([name]) for name in CACHES}
    lazy = {"LazyMAR": LAZY, **alone, **without}
    plain = FastMARConfig(num_iter)
    return {
        "MAR": Mode(plain),
        **{name: Mode(FastMARConfig(num_iter, lazy=config)) for name, config in lazy.items()},
        **{name: Mode(PRESETS[name]()) for name in ("balanced", "fast")},
        "MAR without guidance": Mode(plain, guided=False),
        "LazyMAR without guidance": Mode(FastMARConfig(num_iter, lazy=LAZY), guided=False),
    }


@dataclass(frozen=True)
class Counts:
    """Operations for one image by both counts."""

    published: Work
    executed: Work


@dataclass(frozen=True)
class Share:
    """Savings of one cache, as published: alone, and last (added to the others).

    share: of the savings of all three. Token and condition cache overlap; the overlap is divided evenly:
    (alone + last) / 2. The head cache does not overlap.
    """

    alone: float
    last: float
    share: float


def geometry_of(name: str) -> MARGeometry:
    host = mar_host(cli.named(name).host())
    with torch.device("meta"):
        return MARGeometry.from_model(host.build())


def count(geometry: MARGeometry, mode: Mode) -> Counts:
    """Operations for one image. The value of the guidance scale does not matter."""
    config = mode.config
    plan = DecodingPlan.create(
        geometry.seq_len,
        config.num_iter,
        3.25 if mode.guided else 1.0,
        guidance_start=config.head.guidance_start,
        order=config.order,
    )
    works = [image_work(geometry, plan, config.lazy, e, config.head) for e in (False, True)]
    return Counts(*works)


def tabulate(num_iter: int) -> dict[str, dict[str, Counts]]:
    """Model -> name of a row -> operations for one image."""
    table = {}
    for name in MODELS:
        geometry = geometry_of(name)
        table[name] = {row: count(geometry, mode) for row, mode in modes(num_iter).items()}
    return table


def shares(rows: Mapping[str, Counts]) -> dict[str, Share]:
    """Savings by cache."""
    total = {row: counts.published.total for row, counts in rows.items()}
    saved = total["MAR"] - total["LazyMAR"]
    found = {}
    for name in CACHES:
        alone = total["MAR"] - total[f"{name} cache alone"]
        last = total[f"no {name} cache"] - total["LazyMAR"]
        found[name] = Share(alone, last, (alone + last) / 2 / saved)
    return found


def report(table: Mapping[str, Mapping[str, Counts]]) -> str:
    """Markdown tables, and one line of JSON."""
    work, saved, document = [], [], {}
    for name, rows in table.items():
        for row, counts in rows.items():
            plain = rows["MAR without guidance" if row.endswith("without guidance") else "MAR"]
            published, executed = counts.published, counts.executed.total
            parts = (published.encoder, published.decoder, published.head, published.total)
            ratios = plain.published.total / published.total, plain.executed.total / executed
            costs = [*(x / 1e12 for x in parts), ratios[0], executed / 1e12, ratios[1]]
            work.append([name, row, *(f"{x:.3g}" for x in costs)])
        for cache, found in shares(rows).items():
            teraflops = [f"{x / 1e12:.3g}" for x in (found.alone, found.last)]
            saved.append([name, cache, *teraflops, f"{found.share:.0%}"])
        keys = {"plain": "MAR", "lazy": "LazyMAR", "balanced": "balanced", "fast": "fast"}
        totals = {key: rows[row].published.total / 1e12 for key, row in keys.items()}
        document[name] = {**totals, "ratio": totals["plain"] / totals["lazy"]}
    head = ("TFLOPs per image", "", "encoder", "decoder", "head", "all", "MAR / this")
    head_saved = ("TFLOPs saved", "cache", "alone", "last", "share of all saved")
    blocks = (
        markdown_table((*head, "executed", "MAR / this"), work),
        markdown_table(head_saved, saved),
        json.dumps(document),
    )
    return "\n".join(blocks)


def beside_the_paper(table: Mapping[str, Mapping[str, Counts]]) -> str:
    """Markdown: the published totals of 64 steps, and our counts as a share of them."""
    rows = []
    for name, rows_of in table.items():
        if name == "mar_tiny":
            continue
        plain, lazy = (rows_of[row].published.total / 1e12 for row in ("MAR", "LazyMAR"))
        stated = [tflops_at_64(name, lazy_mar) for lazy_mar in (False, True)]
        ratios = stated[0] / stated[1], plain / lazy
        cells = [f"{stated[0]:.2f}", f"{plain / stated[0]:.1%}", f"{stated[1]:.2f}"]
        cells += [f"{lazy / stated[1]:.1%}", f"{ratios[0]:.2f}", f"{ratios[1]:.2f}"]
        rows.append([name, *cells])
    head = ("published", "MAR", "counted", "LazyMAR", "counted", "ratio", "counted")
    return markdown_table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m util.flops", description="Operations of MAR and LazyMAR for one image."
    )
    parser.add_argument("--num_iter", type=int, default=64, help="autoregressive steps [64]")
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="also write the tables")
    args = parser.parse_args()
    if args.num_iter < 1:
        raise UserError(f"--num_iter is {args.num_iter}; it must be at least 1")
    table = tabulate(args.num_iter)
    text = (beside_the_paper(table) + "\n" if args.num_iter == 64 else "") + report(table)
    if args.output:
        command = shlex.join(["python", "-m", "util.flops", *sys.argv[1:]])
        origin = f"    command: {command}\n    commit: {provenance()['commit']}\n"
        write_text(args.output, f"{text}\n\n{origin}")
    print(text)


if __name__ == "__main__":
    run_main(main)
