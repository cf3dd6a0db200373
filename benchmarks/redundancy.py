"""How little MAR's features change from step to step: LazyMAR's motivation, measured and plotted.

    python -m benchmarks.redundancy                                          # the bundled model
    python -m benchmarks.redundancy --model mar_huge --num_images 16         # an official one

Needs matplotlib (pip install '.[figures]'). Model, tokenizer, sampling and LazyMAR flags are those of
eval.py; all images are one batch. Results: output_dir/benchmarks/redundancy_MODEL*, or where --output
says; those of the documents are in benchmarks/results. Three figures, each beside its numbers in one JSON:

* tokens: similarity of decoder features between neighbouring steps of plain MAR, for tokens decoded
  earlier, in the previous step, now, and later.
* guidance: the same for the two branches and their residual; error of the unconditional features
  when they, or the residual, are reused for as many steps as LazyMAR allows.
* strip: which positions the deep decoder layers of LazyMAR recompute, step by step, over the image.
"""

import sys
from collections import deque
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import OUTPUT, origin, prepare_output, with_ending, write_result
from benchmarks.plots import require_matplotlib
from benchmarks.redundancy_figures import draw
from engine import cli
from engine.mar import MARHost, mar_host
from engine.mar_settings import BEYOND_LAZYMAR
from models.decoding import Decoding
from models.lazy_mar import LazyMARConfig
from models.mar import MAR
from models.noise import ImageNoise
from models.plan import DecodingPlan, DecodingStep
from models.predictor import PlainPredictor
from models.sampling_copy import sampling_copy
from models.step_view import REUSED, views
from util.device import device_name
from util.errors import UserError, run_main
from util.evaluation.batches import image_seed
from util.evaluation.conditions import image_label
from util.evaluation.config import EvaluationConfig
from util.images import to_uint8
from util.report import markdown_table

GROUPS = ("earlier", "previous", "now", "later")


def positions_of(step: DecodingStep, seq_len: int) -> dict[str, slice]:
    """Where in the decoding order the tokens of each of GROUPS are."""
    bounds = (0, step.previous, step.start, step.stop, seq_len)
    return {g: slice(*pair) for g, pair in zip(GROUPS, pairwise(bounds), strict=True)}


class Observer(PlainPredictor):
    """PlainPredictor that computes every token and compares its features with those of earlier steps.

    From the second step on it adds to `similarity` (layers, B, L), conditional branch, and to
    `guidance` (3, B, L): conditional, unconditional, residual. After `ages` steps it also adds to
    `errors` (2 * ages + 1, B * n) for the tokens decoded now: the distance of the unconditional
    output from that of each age, from the conditional one plus the residual of each age, and from
    the conditional one, all divided by its norm.
    """

    first_fills = True  # the first step's features are wanted too

    def __init__(self, model: MAR, order: Tensor, embedding: Tensor, ages: int) -> None:
        """order (2B, L) decoding order; embedding (2B, D)."""
        super().__init__(model, order, embedding)
        self.layers: list[Tensor] = []  # of the step before, (B, L, D) each
        self.outputs: deque[Tensor] = deque(maxlen=ages)  # (2B, L, D), newest first
        self.similarity: list[Tensor] = []
        self.guidance: list[Tensor] = []
        self.errors: list[Tensor] = []

    def __call__(self, step: DecodingStep, tokens: Tensor) -> Tensor:
        """Tokens (B, L, c), known up to step.start -> z (2B, stop - start, D)."""
        model, order = self.model, self.order
        known = tokens[:, : step.start].repeat(2, 1, 1)
        encoded = model.encode(model.embed_known(known, order[:, : step.start], self.embedding))
        x = model.embed_decoder(encoded, order)
        layers = []
        for block in model.decoder_blocks:
            x = block(x)
            layers.append(x[: len(tokens), model.buffer_size :].float())
        x = x[:, model.buffer_size :]
        now = slice(step.start, step.stop)
        self._compare(layers, x.float(), now)
        return model.to_condition(x[:, now], order[:, now])

    def _compare(self, layers: list[Tensor], output: Tensor, now: slice) -> None:
        """layers (B, L, D) each, output (2B, L, D) of this step."""
        if self.layers:
            pairs = zip(layers, self.layers, strict=True)
            self.similarity.append(torch.stack([_similarity(a, b) for a, b in pairs]).cpu())
            pairs = zip(_branches(output), _branches(self.outputs[0]), strict=True)
            self.guidance.append(torch.stack([_similarity(a, b) for a, b in pairs]).cpu())
        if len(self.outputs) == self.outputs.maxlen:
            _, exact, residual = _branches(output[:, now])
            old = [_branches(before[:, now]) for before in self.outputs]
            misses = [exact - unconditional for _, unconditional, _ in old]
            misses += [residual - former for _, _, former in old]
            misses.append(residual)
            distance = torch.stack([miss.norm(dim=-1) for miss in misses]) / exact.norm(dim=-1)
            self.errors.append(distance.flatten(1).cpu())
        self.layers = layers
        self.outputs.appendleft(output)


def _similarity(a: Tensor, b: Tensor) -> Tensor:
    """(B, L, D) twice -> cosine similarities (B, L)."""
    return F.cosine_similarity(a, b, dim=-1)


def _branches(output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(2B, n, D) -> conditional, unconditional, residual (B, n, D)."""
    conditional, unconditional = output.chunk(2)
    return conditional, unconditional, unconditional - conditional


def token_redundancy(plan: DecodingPlan, similarity: list[Tensor]) -> dict[str, object]:
    """Means over images and tokens: of the decoder's output by step, of its layers over all steps."""
    by_step: dict[str, list[float | None]] = {group: [] for group in GROUPS}
    all_steps: dict[str, list[Tensor]] = {group: [] for group in GROUPS}
    for step, values in zip(plan.steps[1:], similarity, strict=True):
        for group, positions in positions_of(step, plan.seq_len).items():
            some = values[:, :, positions].flatten(1)  # (layers, B * n)
            by_step[group].append(some[-1].mean().item() if some.numel() else None)
            all_steps[group].append(some)
    by_layer = {g: torch.cat(some, dim=1).mean(1).tolist() for g, some in all_steps.items()}
    return {
        "steps": [step.index for step in plan.steps[1:]],
        "by_step": by_step,
        "by_layer": by_layer,
    }


def guidance_redundancy(
    plan: DecodingPlan, guidance: list[Tensor], errors: list[Tensor]
) -> dict[str, object]:
    """Means: similarities over the tokens not known yet, by step; errors over all tokens, by age."""
    kinds = ("conditional", "unconditional", "residual")
    by_step: dict[str, list[float]] = {kind: [] for kind in kinds}
    for step, values in zip(plan.steps[1:], guidance, strict=True):
        means = values[:, :, step.start :].mean((1, 2)).tolist()
        for kind, value in zip(kinds, means, strict=True):
            by_step[kind].append(value)
    *old, none = torch.cat(errors, dim=1).mean(1).tolist()
    ages = len(old) // 2
    return {
        "steps": [step.index for step in plan.steps[1:]],
        "by_step": by_step,
        "ages": list(range(1, ages + 1)),
        "error": {"unconditional": old[:ages], "residual": old[ages:], "none": none},
    }


def lazy_strip(
    model: MAR, plan: DecodingPlan, config: LazyMARConfig, label: int, noise: ImageNoise
) -> tuple[dict[str, Any], Tensor]:
    """What LazyMAR recomputes at each step for one image, and its latents (1, C, H, W).

    maps: per step a string of states, as in models.step_view. ranks: when each token is decoded,
    raster order.
    """
    seen = list(views(model, plan, config, label, noise))
    maps = [view.states for view in seen]
    strip = {
        "steps": [view.step.index for view in seen],
        "refresh": [view.refresh for view in seen],
        "known": [view.step.stop for view in seen],
        "grid": model.grid_size,
        "label": label,
        "ranks": noise.orders[0].flip(0).argsort().tolist(),
        "maps": maps,
        "recomputed": [1 - m.count(REUSED) / plan.seq_len for m in maps],
    }
    return strip, seen[-1].latents


@dataclass(frozen=True)
class Request:
    """The images that are measured: labels and seeds of image i as in eval.py."""

    labels: list[int]
    seeds: list[int]
    config: LazyMARConfig


def measure(
    model: MAR, plan: DecodingPlan, request: Request, temperature: float
) -> tuple[dict[str, Any], Tensor]:
    """All numbers of the three figures, and the latents (1, C, H, W) of the strip.

    model: a sampling copy of a MAR; plan: guided, of more steps than config.interval.
    """
    ages = max(1, request.config.interval - 1)
    observing = partial(Observer, ages=ages)
    decoding = Decoding(model, len(request.labels), plan, None, temperature, predictor=observing)
    observer = cast(Observer, decoding.predictor)
    noise = model.image_noise(request.seeds)
    decoding(request.labels, noise, progress=sys.stderr.isatty())
    first = ImageNoise(noise.orders[:1], noise.head[:1])
    strip, latents = lazy_strip(model, plan, request.config, request.labels[0], first)
    document = {
        "tokens": token_redundancy(plan, observer.similarity),
        "guidance": guidance_redundancy(plan, observer.guidance, observer.errors),
        "strip": {**strip, "seed": request.seeds[0]},
    }
    return document, latents


def parse() -> tuple[cli.Selection, MARHost, Path]:
    """The command line: eval.py's flags and --output."""
    parser = cli.make_parser("redundancy", __doc__.splitlines()[0])
    parser.add_flag(
        "output",
        "write PREFIX_tokens.png, ..._guidance.png, ..._strip.png, PREFIX.json and PREFIX.md",
        type=Path,
        metavar="PREFIX",
    )
    flags = parser.parse()
    flags.refuse(BEYOND_LAZYMAR, "is not measured here, only MAR and LazyMAR")
    (output,) = flags.take("output")
    selection = cli.select(flags, "redundancy")
    flags.given["lazy_mar"] = True
    host = mar_host(selection.host())
    output = with_ending(output or OUTPUT / f"redundancy_{selection.model}", "")
    prepare_output(output)
    return selection, host, output


def main() -> None:
    selection, host, output = parse()
    require_matplotlib()
    settings = selection.flags.build(EvaluationConfig, {"no_score": True})  # one image will do
    sampling = host.sampling
    lazy_mar = sampling.lazy_mar
    assert lazy_mar is not None
    if sampling.cfg == 1.0:
        raise UserError("--cfg is 1: without guidance there is no residual; give another scale")
    place = cli.place(selection.flags)
    device, dtype = place.device, place.execution.dtype
    loaded = host.load(device)
    model, tokenizer = loaded.model, loaded.tokenizer
    assert isinstance(model, MAR)
    plan = DecodingPlan.create(
        model.seq_len, sampling.num_iter, sampling.cfg, sampling.cfg_schedule
    )
    if len(plan.steps) <= max(2, lazy_mar.interval):  # with 2, no token is decoded earlier
        raise UserError(
            f"--num_iter {sampling.num_iter} makes {len(plan.steps)} steps; features as old as "
            f"--interval {lazy_mar.interval} allows need more"
        )
    images = range(settings.num_images)
    request = Request(
        [image_label(i, len(images), host.class_num) for i in images],
        [image_seed(settings.seed, i) for i in images],
        lazy_mar,
    )
    with torch.no_grad():
        copy = sampling_copy(model, dtype, whole=model.diffloss)
        document, latents = measure(copy, plan, request, sampling.temperature)
        scale = host.tokenizer.scale(tokenizer)
        image: np.ndarray = to_uint8(tokenizer.decode(latents.float() / scale))[0]
    about = {
        **origin(),
        "weights": loaded.weights,
        "images": settings.num_images,
        "seed": settings.seed,
        **{name: getattr(sampling, name) for name in ("num_iter", "cfg", "cfg_schedule")},
        "strip": sampling.method,
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
    }
    document = {"about": about, **document}
    draw(document, image, output)
    write_result(output, document, summary(document))


def summary(document: dict[str, Any]) -> str:
    """The numbers of the paragraphs, as Markdown tables."""
    layers = document["tokens"]["by_layer"]
    depth = len(layers["now"])
    tokens = markdown_table(
        ["decoder layer", *(f"decoded {group}" for group in GROUPS)],
        [[layer, *(f"{layers[group][layer]:.4f}" for group in GROUPS)] for layer in range(depth)],
    )
    error = document["guidance"]["error"]
    guidance = markdown_table(
        ["age in steps", "unconditional features kept", "residual kept", "no residual"],
        [
            [age, error["unconditional"][age - 1], error["residual"][age - 1], error["none"]]
            for age in document["guidance"]["ages"]
        ],
    )
    share = np.mean(document["strip"]["recomputed"])
    return "\n".join(
        [
            "Cosine similarity of decoder features between neighbouring steps; means over all tokens:",
            "",
            tokens,
            "Relative error of the unconditional features, mean over images and tokens:",
            "",
            guidance,
            f"Image of the strip: {share:.1%} of the tokens are recomputed behind the probe layer.",
            "",
        ]
    )


if __name__ == "__main__":
    run_main(main)
