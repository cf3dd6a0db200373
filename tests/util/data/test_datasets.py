"""Data: crop, class folders, cached latents, and which picture is seen at which step."""

import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from util.data.datasets import (
    BatchPlan,
    CachedFolder,
    CachedTensors,
    ImageFolder,
    batches,
    center_crop,
    to_unit_range,
)
from util.errors import UserError


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        for i in range(3 + label):
            pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    return tmp_path


@pytest.fixture
def latents(tmp_path):
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        for i in range(3 + label):
            moments = np.full((4, 2, 2), 10 * label + i, dtype=np.float32)
            np.savez(tmp_path / name / f"{i}.png.npz", moments=moments, moments_flip=-moments - 1)
    return tmp_path


def test_a_picture_of_the_right_size_is_not_changed_by_the_crop():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert np.array_equal(center_crop(Image.fromarray(pixels), 8).permute(1, 2, 0), pixels)


def test_the_crop_is_the_middle_of_the_long_side():
    pixels = np.zeros((8, 20, 3), dtype=np.uint8)
    pixels[:, 6:14] = 200
    assert (center_crop(Image.fromarray(pixels), 8) == 200).all()


def test_a_large_picture_is_halved_by_boxes_first():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    means = pixels.reshape(16, 2, 16, 2, 3).mean((1, 3)).reshape(8, 2, 8, 2, 3).mean((1, 3))
    cropped = center_crop(Image.fromarray(pixels), 8).permute(1, 2, 0).numpy()
    assert np.abs(cropped - means).max() < 2  # each halving rounds


@pytest.mark.parametrize("size", [(9, 7), (7, 9), (100, 33), (31, 8), (65, 129)])
def test_every_picture_fills_the_square(size):
    image = Image.new("L", size, 255)
    cropped = center_crop(image, 8)
    assert cropped.shape == (3, 8, 8)
    assert (cropped == 255).all()


def test_pixels_map_to_the_range_from_minus_one_to_one():
    assert to_unit_range(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


def test_labels_are_the_sorted_class_folders_and_flips_mirror(folder):
    data = ImageFolder(folder, 8)
    assert (len(data), data.files.classes) == (7, ("cat", "dog"))
    image, label = data[(3, False)]
    assert (label, data.relative_path(3)) == (1, "dog/0.png")
    assert torch.equal(data[(3, True)][0], image.flip(-1))


def test_no_folder_and_no_pictures_are_one_sentence(folder):
    with pytest.raises(UserError, match="no data folder"):
        ImageFolder(folder / "train", 8)
    with pytest.raises(UserError, match="holds no files .npz"):
        CachedFolder(folder)
    with pytest.raises(UserError, match="holds no folder"):
        CachedFolder(folder / "cat")


def test_memory_and_disk_give_the_same_batches(latents):
    data = CachedFolder(latents)
    plan = BatchPlan(len(data), batch_size=3, seed=1)
    picks = plan.epoch(0) + plan.epoch(1)
    pairs = zip(batches(data, picks), batches(CachedTensors(data), picks), strict=True)
    for (a, la), (b, lb) in pairs:
        assert torch.equal(a, b)
        assert torch.equal(la, lb)


def test_a_flipped_pick_is_the_latent_of_the_mirrored_picture(latents):
    data = CachedFolder(latents)
    assert data[(4, False)][0].unique().tolist() == [11.0]
    assert data[(4, True)][0].unique().tolist() == [-12.0]


class Signalled(torch.utils.data.Dataset):
    """Signals the process that reads it, as a scheduler does."""

    def __getitem__(self, pick):
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        return torch.zeros(1), pick[0]


def test_workers_outlive_a_signal_to_all_processes():
    labels = [label.tolist() for _, label in batches(Signalled(), [[(3, False)], [(4, False)]], 1)]
    assert labels == [[3], [4]]


def test_an_epoch_shows_every_picture_at_most_once_in_another_order_each_time():
    plan = BatchPlan(103, batch_size=5, seed=1)
    first, second = plan.epoch(0), plan.epoch(1)
    assert plan.steps == len(first) == 20
    seen = [i for pick in first for i, _ in pick]
    assert len(set(seen)) == 100
    assert first != second
    assert first == plan.epoch(0)
    assert first != BatchPlan(103, batch_size=5, seed=2).epoch(0)


def test_about_half_of_the_pictures_are_flipped():
    flips = [flip for pick in BatchPlan(2000, 100, seed=1).epoch(0) for _, flip in pick]
    assert 900 < sum(flips) < 1100


def test_an_epoch_entered_in_the_middle_continues_with_the_same_batches():
    plan = BatchPlan(103, batch_size=5, seed=1)
    assert plan.epoch(3, first_step=7) == plan.epoch(3)[7:]


def test_the_processes_share_each_step_of_the_single_process():
    single = BatchPlan(64, batch_size=8, seed=1).epoch(0)
    ranks = [BatchPlan(64, 4, seed=1, rank=r, world_size=2).epoch(0) for r in range(2)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == single


def test_fewer_pictures_than_a_step_is_an_error():
    with pytest.raises(UserError, match="7 images are too few for one step of 8"):
        BatchPlan(7, batch_size=4, seed=1, world_size=2)
