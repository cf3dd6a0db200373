"""A synthetic data set: one of ten flat shapes on a flat ground, 64x64 RGB.

Picture n is a function of the integer n alone (label n % 10), so nothing has to be downloaded, and
held-out pictures are other integers. Only two colours, a centre, a radius and a small rotation vary,
so a model of two million parameters learns it in an hour on a CPU. A shape is a signed distance
(negative inside), and a pixel's coverage is that distance clipped.

    python -m util.shapes --output_dir data/shapes --num_images 10000     # an ImageFolder
"""

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from util.errors import UserError, run_main
from util.images import save_png

IMAGE_SIZE = 64  # pixels; every length below is in pixels of a picture of this size
RADIUS = (17.0, 24.0)  # smallest and largest radius of a shape
JITTER = 6.0  # the centre lies at most this far from the middle, in x and in y
ROTATION = 15.0  # degrees, to either side
EDGE = 2.0  # an outline fades over this many pixels
BACKGROUNDS = (  # pastel
    (253, 243, 216),  # cream
    (252, 219, 222),  # rose
    (212, 240, 221),  # mint
    (209, 231, 250),  # sky
    (228, 217, 246),  # lavender
)
FOREGROUNDS = (  # saturated, and darker than every ground
    (206, 38, 62),  # crimson
    (214, 96, 16),  # orange
    (24, 120, 70),  # green
    (0, 118, 134),  # teal
    (38, 64, 160),  # blue
    (118, 42, 148),  # purple
)
HELD_OUT_START = 10_000_000  # training pictures count up from 0, held-out ones from here
BOX = 0.85  # half a square's side over the radius: its corners stay inside the picture

Field = np.ndarray  # float32 (64, 64): a coordinate or a signed distance, in pixels


def _disc(x: Field, y: Field, r: float) -> Field:
    return np.sqrt(x * x + y * y) - r


def _box(x: Field, y: Field, half_width: float, half_height: float) -> Field:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _ring(x: Field, y: Field, r: float) -> Field:
    return np.abs(_disc(x, y, 0.76 * r)) - 0.24 * r


def _square(x: Field, y: Field, r: float) -> Field:
    return _box(x, y, BOX * r, BOX * r)


def _triangle(x: Field, y: Field, r: float) -> Field:
    y = y - 0.12 * r  # the middle of the height, not the centroid, is the centre
    slope = 0.5 * math.sqrt(3) * np.abs(x) - 0.5 * y
    return np.maximum(slope, y) - 0.5 * r


def _star(x: Field, y: Field, r: float) -> Field:
    """A pentagram: the points inside at least four of its five lines."""
    angles = [math.pi * (0.5 + 0.4 * k) for k in range(5)]
    lines = np.stack([x * math.cos(a) + y * math.sin(a) for a in angles])
    lines.partition(3, axis=0)
    return lines[3] - 1.1 * r * math.cos(0.4 * math.pi)


def _cross(x: Field, y: Field, r: float) -> Field:
    return np.minimum(_box(x, y, r, 0.33 * r), _box(x, y, 0.33 * r, r))


def _crescent(x: Field, y: Field, r: float) -> Field:
    """Open at the top: like every class it looks the same mirrored, as training flips pictures."""
    return np.maximum(_disc(x, y, r), -_disc(x, y + 0.5 * r, 0.78 * r))


def _heart(x: Field, y: Field, r: float) -> Field:
    """A square standing on its corner, with a half disc on each of its two upper sides."""
    a, y = 0.58 * r, y - 0.085 * r
    x = np.abs(x)
    diamond = (x + np.abs(y)) * math.sqrt(0.5) - a
    return np.minimum(diamond, _disc(x - a * math.sqrt(0.5), y + a * math.sqrt(0.5), a))


def _stripes(x: Field, y: Field, r: float) -> Field:
    half = BOX * r / 5  # three bars and two gaps of one height
    y = np.abs(y)
    return np.maximum(np.abs(x) - BOX * r, np.minimum(y, np.abs(y - 4 * half)) - half)


def _checker(x: Field, y: Field, r: float) -> Field:
    half = BOX * r / 3  # 3x3 cells; the corners and the middle are filled
    corner = _box(np.abs(x) - 2 * half, np.abs(y) - 2 * half, half, half)
    return np.minimum(corner, _box(x, y, half, half))


SHAPES: dict[str, Callable[[Field, Field, float], Field]] = {
    "disc": _disc,
    "ring": _ring,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "crescent": _crescent,
    "heart": _heart,
    "stripes": _stripes,
    "checker": _checker,
}
CLASSES = tuple(SHAPES)  # in the order of the labels
FOLDERS = tuple(f"{label:02d}_{name}" for label, name in enumerate(CLASSES))


def label_of(index: int) -> int:
    """The class of picture `index`."""
    return index % len(CLASSES)


def render(index: int) -> np.ndarray:
    """Picture `index` (>= 0), uint8 (64, 64, 3)."""
    seed = np.random.SeedSequence(index).generate_state(8)
    random = np.random.RandomState(seed)  # its streams are frozen: the same on every platform
    background = np.array(BACKGROUNDS[random.randint(len(BACKGROUNDS))], np.float32)
    foreground = np.array(FOREGROUNDS[random.randint(len(FOREGROUNDS))], np.float32)
    radius = random.uniform(*RADIUS)
    middle = IMAGE_SIZE / 2 + random.uniform(-JITTER, JITTER, 2)
    angle = math.radians(random.uniform(-ROTATION, ROTATION))
    cover = coverage(CLASSES[label_of(index)], middle, radius, angle)
    return np.rint(background + cover * (foreground - background)).astype(np.uint8)


def coverage(shape: str, middle: np.ndarray, radius: float, angle: float) -> Field:
    """Share of each pixel that a shape covers, float32 (64, 64, 1) in [0, 1].

    middle: x and y (2,) in pixels, like the radius; angle: radians.
    """
    axis = np.arange(IMAGE_SIZE, dtype=np.float32) + np.float32(0.5)
    x, y = axis[None, :] - np.float32(middle[0]), axis[:, None] - np.float32(middle[1])
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = x * cos + y * sin, y * cos - x * sin  # (64, 64): the shape's own axes
    return np.clip(0.5 - SHAPES[shape](x, y, radius) / EDGE, 0, 1)[..., None]


def pictures(start: int, count: int) -> torch.Tensor:
    """Pictures start .. start + count - 1, uint8 (count, 3, 64, 64)."""
    stacked = np.stack([render(index) for index in range(start, start + count)])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous()


def export(output_dir: Path, num_images: int, start: int = 0) -> None:
    """Write pictures start .. start + num_images - 1 as output_dir/train/NN_name/IIIIIII.png.

    Existing pictures are written again with the same bytes. UserError if the folder holds anything else.
    """
    if num_images < 1 or start < 0:
        raise UserError(
            f"--num_images must be at least 1 and --start at least 0, got {num_images} and {start}"
        )
    train = output_dir / "train"
    for folder, known in ((output_dir, ("train",)), (train, FOLDERS)):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file; choose another --output_dir")
        strangers = sorted(set(os.listdir(folder)) - set(known)) if folder.exists() else []
        if strangers:
            raise UserError(
                f"{folder} holds {strangers[0]!r}, which this command did not make; "
                "choose an empty --output_dir"
            )
    for name in FOLDERS:
        (train / name).mkdir(parents=True, exist_ok=True)
    for index in tqdm(range(start, start + num_images), unit="image", disable=None):
        path = train / FOLDERS[label_of(index)] / f"{index:07d}.png"
        save_png(path, render(index))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m util.shapes", description="Export the shapes data set as an ImageFolder."
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_images", type=int, required=True)
    parser.add_argument("--start", type=int, default=0, help="index of the first picture")
    args = parser.parse_args()
    export(args.output_dir, args.num_images, args.start)
    print(f"{args.num_images} pictures of {len(CLASSES)} classes: {args.output_dir / 'train'}")


if __name__ == "__main__":
    run_main(main)
