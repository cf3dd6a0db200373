"""The shapes data set: pictures are functions of integers; the exported folder agrees."""

import numpy as np
import pytest
from PIL import Image

from util.errors import UserError
from util.shapes import (
    BACKGROUNDS,
    CLASSES,
    FOLDERS,
    FOREGROUNDS,
    HELD_OUT_START,
    export,
    label_of,
    pictures,
    render,
)

# Means of the upper and of the left half of pictures 0..9, one of each class. Other values mean
# another data set, for which the files in pretrained_models/mar_tiny are no longer right.
HALVES = [
    (190.24, 196.57),
    (197.41, 198.97),
    (188.38, 190.74),
    (201.52, 206.56),
    (213.88, 208.81),
    (214.76, 198.56),
    (214.88, 203.79),
    (183.27, 203.0),
    (200.33, 211.12),
    (201.45, 199.86),
]


def test_pictures_are_those_the_bundled_files_were_made_from():
    for picture, halves in zip(map(render, range(10)), HALVES, strict=True):
        assert (picture[:32].mean(), picture[:, :32].mean()) == pytest.approx(halves, abs=0.01)


def test_a_picture_does_not_depend_on_what_was_rendered_before():
    first = render(1234)
    render(7)
    np.random.seed(0)
    assert np.array_equal(render(1234), first)


def test_pictures_of_one_class_differ_also_between_training_and_held_out_ones():
    pictures = [render(start + 10 * n) for start in (0, HELD_OUT_START) for n in range(50)]
    assert len({picture.tobytes() for picture in pictures}) == 100


@pytest.mark.parametrize("label", range(10), ids=CLASSES)
def test_a_picture_is_one_flat_shape_of_palette_colours_on_a_flat_ground(label):
    for index in range(label, 200, 10):
        picture = render(index)
        colours, counts = np.unique(picture.reshape(-1, 3), axis=0, return_counts=True)
        common = {tuple(map(int, colours[k])) for k in counts.argsort()[-2:]}
        assert len(common & set(BACKGROUNDS)) == len(common & set(FOREGROUNDS)) == 1
        assert tuple(picture[0, 0]) in BACKGROUNDS, "the ground reaches the corner"
        border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        clipped = (border != picture[0, 0]).any(1).sum()
        assert clipped <= 4, "the shape, but for the last pixel of a tip, is inside the picture"


def test_every_foreground_is_darker_than_every_background():
    luma = np.array([0.299, 0.587, 0.114])
    assert max(FOREGROUNDS @ luma) + 60 < min(BACKGROUNDS @ luma)


def test_pictures_are_batches_of_channels_first_bytes():
    images = pictures(HELD_OUT_START, 20)
    assert images.shape == (20, 3, 64, 64)
    assert np.array_equal(images[13].permute(1, 2, 0).numpy(), render(HELD_OUT_START + 13))


def test_the_alphabetical_order_of_the_folders_is_the_order_of_the_labels():
    assert sorted(FOLDERS) == list(FOLDERS)
    assert [label_of(index) for index in range(20)] == 2 * list(range(10))


def test_the_exported_folder_holds_every_picture_losslessly_under_its_class(tmp_path):
    export(tmp_path / "data", num_images=20, start=5)
    files = sorted((tmp_path / "data").rglob("*.*"))
    assert len(files) == 20
    for path in files:
        index = int(path.stem)
        assert path.parent == tmp_path / "data" / "train" / FOLDERS[label_of(index)]
        assert np.array_equal(np.asarray(Image.open(path)), render(index))


def test_exporting_again_adds_nothing_and_more_pictures_can_follow(tmp_path):
    for start in (0, 0, 10):
        export(tmp_path, num_images=10, start=start)
    assert len(list(tmp_path.rglob("*.png"))) == 20


@pytest.mark.parametrize("stranger", ["notes.txt", "train/n01440764/a.JPEG"])
def test_a_folder_of_somebody_else_is_refused_and_left_alone(tmp_path, stranger):
    path = tmp_path / stranger
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    with pytest.raises(UserError, match="did not make"):
        export(tmp_path, num_images=10)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "data").write_text("")
    with pytest.raises(UserError, match="is a file"):
        export(tmp_path / "data", num_images=10)


@pytest.mark.parametrize(("num_images", "start"), [(0, 0), (10, -1)])
def test_impossible_counts_are_refused(tmp_path, num_images, start):
    with pytest.raises(UserError, match="at least"):
        export(tmp_path, num_images, start)
