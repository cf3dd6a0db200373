"""Captioned shapes: picture and caption are functions of an integer, and a caption parses back."""

import numpy as np
import pytest

from util.shapes import HELD_OUT_START
from util.tiny.captions import (
    COLOURS,
    GROUNDS,
    RELATIONS,
    SINGLE,
    WORDS,
    Scene,
    caption_of,
    describe,
    parse,
    pictures,
    render,
    scene_of,
)

# Captions and mean pixels of pictures 0..3. Other values mean another data set, for which the files
# in pretrained_models/janus_tiny are no longer right.
FIRST = [
    ("a blue ring on a cream ground", 190.25),
    ("a green ring below a blue star", 212.22),
    ("a blue star on a mint ground", 207.29),
    ("a green disc above a red ring on a mint ground", 194.06),
]


def test_pictures_and_captions_are_those_the_bundled_files_were_made_from():
    for index, (caption, mean) in enumerate(FIRST):
        assert caption_of(index) == caption
        assert render(index).mean() == pytest.approx(mean, abs=0.01)


def test_a_picture_and_its_caption_do_not_depend_on_what_was_made_before():
    picture, caption = render(1235), caption_of(1235)
    render(7)
    np.random.seed(0)
    assert np.array_equal(render(1235), picture)
    assert caption_of(1235) == caption


def test_pictures_differ_also_between_training_and_held_out_ones():
    both = [render(start + n) for start in (0, HELD_OUT_START) for n in range(50)]
    assert len({picture.tobytes() for picture in both}) == 100


def test_a_caption_parses_to_the_scene_of_its_picture():
    for index in range(400):
        said, shown = parse(caption_of(index)), scene_of(index)
        assert (said.arrangement, said.objects) == (shown.arrangement, shown.objects)
        assert said.ground in (None, shown.ground)


def test_both_wordings_of_a_scene_mean_the_same():
    scene = parse("a green star above a purple square")
    assert scene == Scene("vertical", (("green", "star"), ("purple", "square")), None)
    assert scene == parse("A purple square  below a green star.")
    for index in range(50):
        shown = scene_of(index)
        assert parse(describe(shown)) == shown == parse(describe(shown, in_order=False))


def test_captions_use_every_word_of_the_grammar_and_no_other():
    used = {word for index in range(2000) for word in caption_of(index).split()}
    assert used == set(WORDS)


def test_half_of_the_captions_name_the_ground_and_each_relation_comes_up():
    captions = [caption_of(index) for index in range(1000)]
    assert 400 < sum("ground" in caption for caption in captions) < 600
    for relation in RELATIONS:
        assert 80 < sum(f" {relation} " in caption for caption in captions) < 170


def test_the_picture_shows_the_colours_and_the_places_of_its_scene():
    for index in range(200):
        picture, scene = render(index).astype(int), scene_of(index)
        assert tuple(picture[0, 0]) == GROUNDS[scene.ground]
        centres = []
        for colour, _ in scene.objects:
            ys, xs = np.nonzero((picture == COLOURS[colour]).all(2))
            assert len(xs) > 50
            centres.append((xs.mean(), ys.mean()))
        if scene.arrangement != SINGLE and scene.objects[0][0] != scene.objects[1][0]:
            (x0, y0), (x1, y1) = centres
            gap, drift = (
                (y1 - y0, x1 - x0) if scene.arrangement == "vertical" else (x1 - x0, y1 - y0)
            )
            assert gap > 20 and abs(drift) < 13


def test_shapes_stay_inside_the_picture_and_two_do_not_touch():
    for index in range(200):
        picture = render(index).astype(int)
        border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        assert (border != picture[0, 0]).any(1).sum() <= 4, "the last pixel of a tip may be cut"
        scene = scene_of(index)
        if scene.arrangement != SINGLE:
            lines = picture if scene.arrangement == "vertical" else picture.swapaxes(0, 1)
            ground = (np.abs(lines - picture[0, 0]).max(2) < 128).all(1)
            assert ground[26:38].any(), "a line of ground lies between them"


def test_pictures_are_batches_of_channels_first_bytes():
    batch = pictures(HELD_OUT_START, 3)
    assert batch.shape == (3, 3, 64, 64)
    assert np.array_equal(batch[2].permute(1, 2, 0).numpy(), render(HELD_OUT_START + 2))


@pytest.mark.parametrize(
    "caption",
    ["", "a disc", "a teal disc", "a red disc on a red ground", "a red disc near a blue disc"],
)
def test_a_caption_outside_the_grammar_is_refused_with_an_example(caption):
    with pytest.raises(ValueError, match="outside the grammar.*a red disc on a blue ground"):
        parse(caption)
