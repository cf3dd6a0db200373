"""Trains the tokenizer of janus_tiny: a small VQModel on captioned shapes.

    python -m util.tiny.janus_vq --output_dir output_dir/janus_tiny/tokenizer

Janus uses LlamaGen's tokenizer, so the recipe is that of util.tiny.vq and `janus_weights` renames the
result. The same command resumes.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from models.vq import VQModel
from util.data.datasets import to_unit_range
from util.errors import UserError, run_main
from util.images import contact_sheet, save_png, to_uint8
from util.shapes import HELD_OUT_START
from util.tiny import captions
from util.tiny.training import save_weights
from util.tiny.vq import test, train

TOKENIZER, RECONSTRUCTIONS = "tokenizer.safetensors", "reconstructions.png"  # in the output folder
STEPS = 2000
CODES = 512
CODE_CHANNELS = 8
LATENT_CHANNELS = 32
BASE_CHANNELS = 64  # Janus normalizes in 32 groups, and groups of one channel lose the colour
CHANNEL_MULTIPLIER = (1, 1, 1)  # stride 4
RES_BLOCKS = 0  # in each level of the encoder; the decoder has one more


def janus_vq() -> VQModel:
    """The tokenizer of janus_tiny: 64x64 pixels, 512 codes, stride 4."""
    return VQModel(
        CODES,
        CODE_CHANNELS,
        ch=BASE_CHANNELS,
        ch_mult=CHANNEL_MULTIPLIER,
        num_res_blocks=RES_BLOCKS,
        z_channels=LATENT_CHANNELS,
    )


def janus_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a VQModel under the names of transformers' JanusVQVAE, with unit codes.

    JanusVQVAE normalizes codes when it decodes but not when it encodes; unit codes make both agree.
    """
    from models.janus_original import TOKENIZER_KEYS  # needs transformers

    renamed = {}
    for name, tensor in weights.items():
        for old, new in TOKENIZER_KEYS.items():
            name = name.replace(old, new)
        renamed[name] = tensor
    del renamed["quantize.codebook_used"]
    codes = "quantize.embedding.weight"
    renamed[codes] = F.normalize(renamed[codes].float(), dim=-1).to(renamed[codes].dtype)
    return renamed


def draw(start: int, count: int) -> Tensor:
    """Pictures start .. start + count - 1, float32 (count, 3, 64, 64) in [-1, 1]."""
    return to_unit_range(captions.pictures(start, count))


@torch.no_grad()
def save_reconstructions(model: VQModel, path: Path, rows: int = 4, columns: int = 10) -> None:
    """Write a sheet of held-out pictures, each row followed by its reconstructions."""
    images = draw(HELD_OUT_START, rows * columns)
    both = torch.stack([images, model.decode(model.encode(images))])  # (2, rows * columns, ...)
    lines = both.unflatten(1, (rows, columns)).transpose(0, 1).flatten(0, 2)
    save_png(path, contact_sheet(to_uint8(lines), columns, padding=0))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m util.tiny.janus_vq", description="Train the tokenizer of janus_tiny."
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    if args.steps < 1:
        raise UserError(f"--steps must be at least 1, got {args.steps}")
    trained = train(args.output_dir, args.steps, janus_vq, draw)
    weights = {name: tensor.half() for name, tensor in trained.state_dict().items()}
    model = janus_vq().eval()
    model.load_state_dict(weights)  # what is tested is what is written
    result = test(model, draw)
    made_by = f"python -m util.tiny.janus_vq --steps {args.steps}"
    save_reconstructions(model, args.output_dir / RECONSTRUCTIONS)
    save_weights(args.output_dir / TOKENIZER, weights, {**result, "made_by": made_by})
    print(json.dumps(result))


if __name__ == "__main__":
    run_main(main)
