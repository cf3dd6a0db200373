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
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import OUTPUT, Parser, origin, with_ending, write_result
from benchmarks.line_common import Pictures
from benchmarks.line_quality import EVERY, FULL, draw, measured, picture, plans, tables
from benchmarks.plots import require_matplotlib
from engine import cli
from engine.text_to_image import TextToImageHost
from models.gpt_images import GPTSampling
from models.line_config import LineARConfig
from util import metrics
from util.device import pick_device
from util.errors import UserError, run_main
from util.evaluation.batches import image_seed
from util.images import save_png, to_uint8
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


def parse() -> argparse.Namespace:
    """Flags, checked."""
    parser = Parser("line_prompts", __doc__)
    parser.add_argument("--resume", default=HOST.resume, metavar="DIR", help="folder of a Janus")
    parser.number("num_images", 1000)
    parser.number("kl_images", 20, "the first ones, for KL")
    parser.number("columns", 8, "images of the picture, the first ones")
    parser.add_argument("--methods", default=EVERY[0], help="rows of the table")
    parser.add_argument("--budgets", default=EVERY[1], help="its columns")
    parser.number("batch", 100, "images per batch")
    parser.number("seed", 1, "as in eval.py", least=0)
    parser.add_argument("--cfg", type=float, default=HOST.sampling.cfg)
    parser.add_argument("--recent", type=int, default=RECENT, help="lines that are never evicted")
    parser.add_argument("--device")
    args = parser.read(OUTPUT / "line_prompts")
    for name in ("kl_images", "columns"):
        if (count := getattr(args, name)) > args.num_images:
            raise UserError(f"--{name} is {count}; there are {args.num_images} images")
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

    @cache
    def full() -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Inputs and codes of the full cache, and their log-probabilities."""
        inputs = drawing.inputs(args.kl_images)
        codes = drawing.codes(inputs, args.cfg)
        return inputs, codes, drawing.log_probabilities(inputs, codes, None)

    def make(config: LineARConfig | None) -> np.ndarray:
        starts = range(0, args.num_images, args.batch)
        batches = [range(start, min(start + args.batch, args.num_images)) for start in starts]
        drawn = [drawing.images(part, replace(sampling, line_ar=config)) for part in batches]
        return np.concatenate(drawn)

    def measure(images: np.ndarray, config: LineARConfig | None) -> dict[str, Any]:
        inputs, codes, expected = full()
        kl = divergence(expected, drawing.log_probabilities(inputs, codes, config))
        request, labels = SELECTION.request(), drawing.prompts
        score = metrics.score(Pictures(images), len(images), request, "cpu", labels=labels)
        return {"kl": 1000 * kl, **score}

    rows = measured(output, about, wanted, make, measure)
    draw(rows, output)
    agreement = {(row["method"], row["budget"]): f"agreement {row['accuracy']:.1%}" for row in rows}

    def make_first(config: LineARConfig | None) -> np.ndarray:
        return drawing.images(range(args.columns), replace(sampling, line_ar=config))

    sheet = picture(PICTURE, agreement, wanted, make_first)
    save_png(with_ending(output, ".png"), sheet)
    shown = "\n".join(f"{i}. {text}" for i, text in enumerate(drawing.prompts[: args.columns], 1))
    text = f"{tables(rows, COLUMNS)}\nPrompts of the picture:\n\n{shown}\n"
    write_result(args.output, {"about": about, "rows": rows}, text)


if __name__ == "__main__":
    run_main(main)
