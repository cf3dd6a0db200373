"""Trains the tokenizer of gpt_tiny: a small VQModel on the shapes data set.

    python -m util.tiny.vq --output_dir output_dir/vq_tiny

It starts as a plain autoencoder with latents on the unit sphere. Then k-means of these latents gives the
codebook, and codes, encoder and decoder are trained together (van den Oord et al., NeurIPS 2017,
equation 3). Step i uses pictures from i * BATCH on, so the same command continues after a stop.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from models.vq import VQModel, vq_tiny
from util import shapes
from util.data.datasets import to_unit_range
from util.errors import run_main
from util.shapes import HELD_OUT_START
from util.tiny.training import load_checkpoint, save_checkpoint, save_weights
from util.weights import load_into

BUNDLE = Path("pretrained_models/gpt_tiny/tokenizer.safetensors")
STEPS = 1000
BATCH = 16  # pictures
PEAK_LR = 1e-3
WARMUP = 50  # steps of linear warm-up; then a cosine to zero
CONTINUOUS = 150  # steps without a codebook
COMMITMENT = 0.25  # van den Oord et al., equation 3: beta; LlamaGen's value too
KMEANS_ITERATIONS = 10
KMEANS_PICTURES = 128
REVIVE_EVERY = 50  # steps after which codes that were not used start again at a latent
SAVE_EVERY = 50  # steps
TEST_PICTURES = 1000

Pictures = Callable[[int, int], Tensor]  # start, count => float32 (count, 3, 64, 64) in [-1, 1]


def pictures(start: int, count: int) -> Tensor:
    """Pictures start .. start + count - 1, float32 (count, 3, 64, 64) in [-1, 1]."""
    return to_unit_range(shapes.pictures(start, count))


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine to zero at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def unit_latents(model: VQModel, images: Tensor) -> Tensor:
    """Directions of the latents, (B, C, h, w)."""
    return F.normalize(model.latents(images), dim=1)


def loss_of(model: VQModel, images: Tensor, quantized: bool) -> tuple[Tensor, Tensor | None]:
    """Reconstruction error (L1 + L2), with both codebook terms if quantized; the codes used."""
    z = unit_latents(model, images)
    codes, extra, fed = None, 0.0, z
    if quantized:
        codes = model.quantize.nearest(z.detach())
        e = model.quantize.lookup(codes)
        distance = lambda a, b: (a - b).square().sum(1).mean()  # noqa: E731
        extra = distance(z.detach(), e) + COMMITMENT * distance(z, e.detach())
        fed = z + (e - z).detach()  # straight through
    out = model.decode_latents(fed)
    return F.l1_loss(out, images) + F.mse_loss(out, images) + extra, codes


@torch.no_grad()
def start_codebook(model: VQModel, draw: Pictures) -> None:
    """Spherical k-means of latents of the first pictures, from a random choice of them."""
    z = torch.cat([unit_latents(model, draw(i, 32)) for i in range(0, KMEANS_PICTURES, 32)])
    z = z.movedim(1, -1).flatten(0, 2)  # (n, C)
    size = model.quantize.embedding.num_embeddings
    centres = z[torch.randperm(len(z))[:size]]
    for _ in range(KMEANS_ITERATIONS):
        nearest = (z @ centres.T).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, z)
        empty = sums.norm(dim=1) < 1e-6
        sums[empty] = z[torch.randperm(len(z))[: int(empty.sum())]]
        centres = F.normalize(sums, dim=1)
    model.quantize.embedding.weight.copy_(centres)


@torch.no_grad()
def revive(model: VQModel, used: Tensor, images: Tensor) -> None:
    """Put codes that were not used (used: bool (K,)) at latents of these pictures."""
    z = unit_latents(model, images).movedim(1, -1).flatten(0, 2)
    dead = int((~used).sum())
    model.quantize.embedding.weight[~used] = z[torch.randperm(len(z))[:dead]]


@torch.no_grad()
def test(model: VQModel, draw: Pictures) -> dict[str, float]:
    """Error on held-out pictures, as PSNR in dB, and codes in use."""
    errors, used = [], set()
    for start in range(HELD_OUT_START, HELD_OUT_START + TEST_PICTURES, 50):
        images = draw(start, 50)
        codes = model.encode(images)
        errors.append(((model.decode(codes).clamp(-1, 1) - images) / 2).square().mean().item())
        used |= set(codes.flatten().tolist())
    return {
        "held_out_psnr_db": round(-10 * math.log10(sum(errors) / len(errors)), 2),
        "codes_used": len(used),
    }


def load_tokenizer(path: Path, make: Callable[[], VQModel] = vq_tiny) -> VQModel:
    """The trained tokenizer that `make` makes, in evaluation mode. UserError when the file is not one."""
    model = make()
    load_into(model, path)
    return model.eval().requires_grad_(False)


def train(
    output_dir: Path, steps: int, make: Callable[[], VQModel] = vq_tiny, draw: Pictures = pictures
) -> VQModel:
    """Train the model that `make` makes, or continue from the checkpoint in output_dir."""
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    used = torch.zeros(model.quantize.embedding.num_embeddings, dtype=torch.bool)
    checkpoint, done = output_dir / "checkpoint-last.pth", 0
    output_dir.mkdir(parents=True, exist_ok=True)
    if state := load_checkpoint(checkpoint, model, optimizer, "step", "used"):
        done, used = state["step"], state["used"]
    bar = tqdm(range(done, steps), initial=done, total=steps, unit="step", disable=None)
    for step in bar:
        torch.manual_seed(step)
        images = draw(step * BATCH, BATCH)
        if step == CONTINUOUS:
            start_codebook(model, draw)
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, PEAK_LR, WARMUP)
        loss, codes = loss_of(model, images, quantized=step >= CONTINUOUS)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if codes is not None:
            used[codes.flatten()] = True
        if step > CONTINUOUS and step % REVIVE_EVERY == 0:
            bar.write(f"step {step}: loss {loss.item():.4f}, {int(used.sum())} codes in use")
            if step < 0.7 * steps:
                revive(model, used, images)
            used.zero_()
        if (step + 1) % SAVE_EVERY == 0:
            save_checkpoint(checkpoint, model, optimizer, step=step + 1, used=used)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m util.tiny.vq", description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True, help="for the checkpoint")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--bundle", type=Path, default=BUNDLE, help="file to write at the end")
    args = parser.parse_args()
    model = train(args.output_dir, args.steps)
    result = test(model, pictures)
    made_by = f"python -m util.tiny.vq --steps {args.steps}"
    save_weights(args.bundle, model.state_dict(), {**result, "made_by": made_by})
    print(json.dumps(result))


if __name__ == "__main__":
    run_main(main)
