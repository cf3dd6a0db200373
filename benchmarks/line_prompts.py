"""Methods of cache compression on a text-to-image model: KL, agreement with the prompts, FID, a picture.

    python -m benchmarks.line_prompts                   # the bundled janus_tiny, 1,000 images

Prompts are the held-out captions of util.tiny.captions, image i draws caption i with eval.py's seed. All
rows have the same prompts and seeds, so they differ by the cache alone. KL(full || compressed) of the next
code, in nats, is that of the conditional branch, fed with codes that the full cache sampled. Agreement is
the share of images that show all that their prompts say. A row is written when it is finished, with its
commit; the same command resumes. Results: output_dir/benchmarks/line_prompts.{json,md,png} and
line_prompts_fid.png, or where --output says; those of the documents are in benchmarks/results.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import (
    OUTPUT,
    add_output,
    at_least,
    origin,
    prepare_output,
    stored_rows,
    with_ending,
    write_result,
)
from benchmarks.line_common import Pictures
from benchmarks.line_quality import EVERY, FULL, draw, plans, tables
from benchmarks.plots import require_matplotlib
from engine import cli
from engine.text_to_image import TextToImageHost
from models.gpt_images import GPTSampling
from models.line_config import LineARConfig
from util import metrics
from util.device import pick_device
from util.errors import UserError, run_main
from util.evaluation.batches import image_seed
from util.files import write_json
from util.images import save_png, side_by_side_sheet, to_uint8
from util.shapes import HELD_OUT_START, IMAGE_SIZE
from util.tiny.captions import caption_of

SELECTION = cli.named("janus_tiny")
HOST = cast(TextToImageHost, SELECTION.host())
RECENT = int(SELECTION.defaults["line_recent"])
PICTURE = [(FULL, "1"), ("linear", "1/4"), ("stratified", "1/4"), ("rkv", "1/4")]
COLUMNS = (  # keys of a row, their titles, their formats
    ("kl", "KL, thousandths of a nat", ".1f"),
    ("accuracy", "Agreement", ".1%"),
    ("fid", "FID", ".3f"),
)
SAME = ("weights", "images", "kl_images", "seed", "cfg", "recent", "device", "dtype")


class Drawing:
    """A Janus, its prompts, and what it draws of them with each cache."""

    def __init__(self, resume: str, num_images: int, seed: int, device: torch.device) -> None:
        host = cast(TextToImageHost, cli.named("janus_tiny", resume=resume).host())
        loaded = host.load(device)
        self.model: Any = loaded.model.requires_grad_(False)
        self.processor, self.weights = loaded.tokenizer, loaded.weights
        self.grid = host.grid(self.model)
        self.prompts = [caption_of(HELD_OUT_START + i) for i in range(num_images)]
        self.seeds = [image_seed(seed, i) for i in range(num_images)]

    def images(self, indices: Sequence[int], sampling: GPTSampling) -> np.ndarray:
        """uint8 (N, 64, 64, 3) of some of the prompts, in one batch."""
        from models.janus import JanusGenerator

        generator = JanusGenerator(self.model, self.processor, sampling, IMAGE_SIZE)
        prompts, seeds = [self.prompts[i] for i in indices], [self.seeds[i] for i in indices]
        return to_uint8(generator.generate(generator.prepare(prompts, seeds)))

    def inputs(self, count: int) -> dict[str, Tensor]:
        """Tokens of the first prompts."""
        from models.janus import JanusGenerator

        generator = JanusGenerator(self.model, self.processor, GPTSampling(), IMAGE_SIZE)
        return generator.prepare(self.prompts[:count], self.seeds[:count])[0]

    def codes(self, inputs: dict[str, Tensor], cfg: float) -> Tensor:
        """What the full cache samples, (B, N)."""
        from models.janus import sample_tokens

        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        return sample_tokens(self.model, ids, mask, cfg, seeds=self.seeds[: len(ids)])

    @torch.no_grad()
    def log_probabilities(
        self, inputs: dict[str, Tensor], codes: Tensor, line_ar: LineARConfig | None
    ) -> Tensor:
        """Of each code, without guidance, after those in front of it, (B, N, vocab)."""
        from models.transformers_cache import line_ar_attention
        from models.transformers_models import Decoder, new_cache

        model, steps = self.model, []
        x = model.get_input_embeddings()(inputs["input_ids"])
        with line_ar_attention(model):
            cache = new_cache(line_ar, self.grid)
            decode = Decoder(model.model.language_model, cache, inputs["attention_mask"])
            for code in codes.split(1, dim=1):
                steps.append(model.model.generation_head(decode(inputs_embeds=x)).float())
                x = model.prepare_embeddings_for_image_generation(code)
        return torch.stack(steps, dim=1).log_softmax(-1)


def divergence(full: Tensor, other: Tensor) -> float:
    """KL(full || other) of log-probabilities (B, N, vocab), nats per code."""
    return (full.exp() * (full - other)).sum(-1).double().mean().item()


def picture(
    drawing: Drawing,
    sampling: GPTSampling,
    rows: list[dict[str, Any]],
    wanted: Sequence[tuple[str, str, LineARConfig | None]],
    columns: int,
) -> np.ndarray:
    """The first prompts by those of the wanted rows that are in PICTURE: uint8 (H, W, 3)."""
    agreement = {(row["method"], row["budget"]): row["accuracy"] for row in rows}
    strips = {}
    for method, budget, config in wanted:
        if (method, budget) in PICTURE:
            name = method if config is None else f"{method} {budget}"
            strips[f"{name}: agreement {agreement[method, budget]:.1%}"] = drawing.images(
                range(columns), replace(sampling, line_ar=config)
            )
    return side_by_side_sheet(strips, scale=2)


def parse() -> argparse.Namespace:
    """Flags, checked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.line_prompts", description=__doc__)
    parser.add_argument("--resume", default=HOST.resume, metavar="DIR", help="folder of a Janus")
    parser.add_argument("--num_images", type=int, default=1000)
    parser.add_argument("--kl_images", type=int, default=20, help="the first ones, for KL")
    parser.add_argument(
        "--columns", type=int, default=8, help="images of the picture, the first ones"
    )
    parser.add_argument("--methods", default=EVERY[0], help="rows of the table")
    parser.add_argument("--budgets", default=EVERY[1], help="its columns")
    parser.add_argument("--batch", type=int, default=100, help="images per batch")
    parser.add_argument("--seed", type=int, default=1, help="as in eval.py")
    parser.add_argument("--cfg", type=float, default=HOST.sampling.cfg)
    parser.add_argument("--recent", type=int, default=RECENT, help="lines that are never evicted")
    parser.add_argument("--device")
    add_output(parser, OUTPUT / "line_prompts")
    args = parser.parse_args()
    at_least(args, 1, "num_images", "kl_images", "columns", "batch")
    at_least(args, 0, "seed")
    for name in ("kl_images", "columns"):
        if getattr(args, name) > args.num_images:
            raise UserError(
                f"--{name} is {getattr(args, name)}; there are {args.num_images} images"
            )
    prepare_output(args.output)
    return args


def main() -> None:
    """Command line."""
    args = parse()
    require_matplotlib()
    output: Path = with_ending(args.output, ".json")
    device = pick_device(args.device)
    drawing = Drawing(args.resume, args.num_images, args.seed, device)
    try:
        sampling = GPTSampling(args.cfg)
        wanted = plans(args.methods, args.budgets, args.recent, drawing.grid)
    except ValueError as error:
        raise UserError(str(error)) from error
    about = {
        **origin(),
        "weights": drawing.weights,
        "images": args.num_images,
        "kl_images": args.kl_images,
        "seed": args.seed,
        "cfg": args.cfg,
        "recent": args.recent,
        "device": str(device),
        "dtype": "float32",
        "threads": torch.get_num_threads(),
    }
    rows = stored_rows(output, {name: about[name] for name in SAME})
    done = {(row["method"], row["budget"]) for row in rows}
    if todo := [row for row in wanted if row[:2] not in done]:
        inputs = drawing.inputs(args.kl_images)
        codes = drawing.codes(inputs, args.cfg)
        full = drawing.log_probabilities(inputs, codes, None)
    for method, budget, config in todo:
        began = time.perf_counter()
        starts = range(0, args.num_images, args.batch)
        batches = [range(start, min(start + args.batch, args.num_images)) for start in starts]
        images = [drawing.images(part, replace(sampling, line_ar=config)) for part in batches]
        seconds = time.perf_counter() - began
        kl = divergence(full, drawing.log_probabilities(inputs, codes, config))
        pictures = Pictures(np.concatenate(images))
        request = SELECTION.request()
        row = {
            "method": method,
            "budget": budget,
            "kl": 1000 * kl,
            **metrics.score(pictures, args.num_images, request, "cpu", labels=drawing.prompts),
            "images_per_s": args.num_images / seconds,
            "commit": about["commit"],
        }
        rows.append(row)
        write_json(output, {"about": about, "rows": rows})
        print(json.dumps(row), flush=True)
    draw(rows, output)
    sheet = picture(drawing, sampling, rows, wanted, args.columns)
    save_png(with_ending(output, ".png"), sheet)
    shown = "\n".join(f"{i}. {text}" for i, text in enumerate(drawing.prompts[: args.columns], 1))
    text = f"{tables(rows, COLUMNS)}\nPrompts of the picture:\n\n{shown}\n"
    write_result(args.output, {"about": about, "rows": rows}, text)


if __name__ == "__main__":
    run_main(main)
