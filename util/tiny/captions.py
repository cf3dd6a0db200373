"""Captioned shapes: pictures of one or two flat shapes, each with a sentence that describes it.

Picture and caption `n` are functions of the integer n alone, as in util.shapes, whose shapes and
palette these are. The grammar:

    caption  = object [" " relation " " object] [" on a " ground " ground"]
    object   = ("a " | "an ") colour " " shape
    relation = "above" | "below" | "left of" | "right of"

Every even picture shows one shape, every odd picture two smaller ones. Half of the captions name
the ground.

    python -m util.tiny.captions --num_images 100 > prompts.txt     # held-out captions, one per line
"""

import argparse
import math
import re
from dataclasses import dataclass, replace

import numpy as np
import torch

from util import shapes
from util.errors import UserError, run_main

SHAPES = ("disc", "ring", "square", "triangle", "star", "cross")
_NAMES = ("red", "orange", "green", "teal", "blue", "purple")
COLOURS = dict(zip(_NAMES, shapes.FOREGROUNDS, strict=True))
del COLOURS["teal"]  # it lies between green and blue
GROUNDS = dict(zip(("cream", "pink", "mint", "blue"), shapes.BACKGROUNDS[:4], strict=True))
SINGLE, VERTICAL, HORIZONTAL = ARRANGEMENTS = ("single", "vertical", "horizontal")
RELATIONS = {  # words: arrangement, whether the object named first is the upper or left one
    "above": (VERTICAL, True),
    "below": (VERTICAL, False),
    "left of": (HORIZONTAL, True),
    "right of": (HORIZONTAL, False),
}
WORDS = tuple(
    dict.fromkeys(
        ("a", "an", "on", "ground", "of", *(word.split()[0] for word in RELATIONS))
        + (*COLOURS, *GROUNDS, *SHAPES)
    )
)  # every word of the grammar once
PAIR_RADIUS = (11.0, 13.5)  # pixels, smallest and largest radius of each of two shapes
PAIR_OFFSET = 15.5  # of two shapes: distance of a centre from the middle, along their axis
PAIR_JITTER = (1.0, 5.0)  # largest displacement of a centre, along and across that axis
SCENE, WORDING, LAYOUT = 1, 2, 3  # streams of random numbers of a picture

_OBJECT = f"an? ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_CAPTION = re.compile(
    rf"{_OBJECT}(?: ({'|'.join(RELATIONS)}) {_OBJECT})?(?: on a ({'|'.join(GROUNDS)}) ground)?"
)


@dataclass(frozen=True)
class Scene:
    """What a caption says of a picture, and what a classifier finds in one.

    arrangement: of ARRANGEMENTS. objects: (colour, shape) of the single one, or of the upper or left
    one and the other. ground: None where a caption leaves it open.
    """

    arrangement: str
    objects: tuple[tuple[str, str], ...]
    ground: str | None = None


def parse(caption: str) -> Scene:
    """The scene that a caption describes. ValueError where the grammar does not allow it."""
    match = _CAPTION.fullmatch(" ".join(caption.lower().split()).rstrip("."))
    if match is None:
        raise ValueError(
            f"the caption {caption!r} is outside the grammar: write, for example, 'a red disc on a "
            f"blue ground' or 'a green star above a purple square'; shapes: {', '.join(SHAPES)}; "
            f"colours: {', '.join(COLOURS)}; grounds: {', '.join(GROUNDS)}; "
            f"relations: {', '.join(RELATIONS)}"
        )
    colour, shape, relation, other_colour, other_shape, ground = match.groups()
    if relation is None:
        return Scene(SINGLE, ((colour, shape),), ground)
    arrangement, in_order = RELATIONS[relation]
    objects = ((colour, shape), (other_colour, other_shape))
    return Scene(arrangement, objects if in_order else objects[::-1], ground)


def describe(scene: Scene, in_order: bool = True) -> str:
    """The caption of a scene. in_order: of two objects name the upper or left one first."""
    objects = [
        f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}"
        for colour, shape in scene.objects
    ]
    text = objects[0]
    if len(objects) == 2:
        relation = next(r for r, v in RELATIONS.items() if v == (scene.arrangement, in_order))
        text = f" {relation} ".join(objects if in_order else objects[::-1])
    return text if scene.ground is None else f"{text} on a {scene.ground} ground"


def _random(index: int, stream: int) -> np.random.RandomState:
    """Random numbers of picture `index`, frozen by numpy: the same on every platform."""
    return np.random.RandomState(np.random.SeedSequence([index, stream]).generate_state(8))


def scene_of(index: int) -> Scene:
    """What picture `index` (>= 0) shows, ground included. Two objects are never the same."""
    random = _random(index, SCENE)
    things = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    ground = list(GROUNDS)[random.randint(len(GROUNDS))]
    count = 1 + index % 2
    objects = tuple(things[k] for k in random.permutation(len(things))[:count])
    arrangement = (VERTICAL, HORIZONTAL)[random.randint(2)] if count == 2 else SINGLE
    return Scene(arrangement, objects, ground)


def caption_of(index: int) -> str:
    """Caption of picture `index` (>= 0)."""
    in_order, names_ground = map(bool, _random(index, WORDING).randint(2, size=2))
    scene = scene_of(index)
    return describe(scene if names_ground else replace(scene, ground=None), in_order)


def render(index: int) -> np.ndarray:
    """Picture `index` (>= 0), uint8 (64, 64, 3)."""
    scene, random = scene_of(index), _random(index, LAYOUT)
    single = scene.arrangement == SINGLE
    assert scene.ground is not None  # that of a picture never is
    picture = np.array(GROUNDS[scene.ground], np.float32)  # (3,)
    for place, (colour, shape) in enumerate(scene.objects):
        if single:
            middle = random.uniform(-shapes.JITTER, shapes.JITTER, 2)
        else:
            along, across = random.uniform(-1, 1, 2) * PAIR_JITTER
            middle = np.array([across, along + PAIR_OFFSET * (2 * place - 1)])  # x, y
            middle = middle if scene.arrangement == VERTICAL else middle[::-1]
        radius = random.uniform(*(shapes.RADIUS if single else PAIR_RADIUS))
        angle = math.radians(random.uniform(-shapes.ROTATION, shapes.ROTATION))
        cover = shapes.coverage(shape, middle + shapes.IMAGE_SIZE / 2, radius, angle)
        paint = np.array(COLOURS[colour], np.float32)
        picture = picture + cover * (paint - picture)
    return np.rint(picture).astype(np.uint8)


def pictures(start: int, count: int) -> torch.Tensor:
    """Pictures start .. start + count - 1, uint8 (count, 3, 64, 64)."""
    stacked = np.stack([render(index) for index in range(start, start + count)])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m util.tiny.captions", description="Print captions, one per line."
    )
    parser.add_argument("--num_images", type=int, required=True)
    parser.add_argument(
        "--start", type=int, default=shapes.HELD_OUT_START, help="index of the first one"
    )
    args = parser.parse_args()
    if args.num_images < 1 or args.start < 0:
        raise UserError(
            f"--num_images must be at least 1 and --start at least 0, "
            f"got {args.num_images} and {args.start}"
        )
    for index in range(args.start, args.start + args.num_images):
        print(caption_of(index))


if __name__ == "__main__":
    run_main(main)
