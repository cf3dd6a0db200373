"""What is wrong with training data is said before training, in one sentence with the file's name."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from util.data import checks
from util.data.class_folders import ClassFolders
from util.data.config import DataConfig
from util.data.datasets import CachedFolder, CachedTensors, ImageFolder
from util.dist import World
from util.errors import UserError

SHAPE = (4, 2, 2)
NAMES = [f"n01440764_{i}.JPEG.npz" for i in range(6)]  # as the original's main_cache.py writes them


def write_latent(path, shape=SHAPE, value=1.0, **more):
    moments = np.full(shape, value, dtype=np.float32)
    np.savez(path, **{"moments": moments, "moments_flip": -moments, **more})


@pytest.fixture
def latents(tmp_path):
    for label, name in enumerate(("n01440764", "n01443537")):
        (tmp_path / name).mkdir()
        for i, file in enumerate(NAMES):
            write_latent(tmp_path / name / file, value=10 * label + i)
    return tmp_path


@pytest.fixture
def pictures(tmp_path):
    """tmp_path/train with two classes of three pictures."""
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (8, 8), (i, 2, 3)).save(tmp_path / "train" / name / f"{i}.png")
    return tmp_path / "train"


def opened(folder, world=None, class_num=2, **changes):
    """The data of `folder`, by default latents, for a model of 8 pixels with 2x2 latents."""
    paths = {"data_path": str(folder.parent), "cached_path": str(folder)}
    config = DataConfig(**{**paths, "use_cached": True, "num_workers": 2, **changes})
    return checks.open_data(config, checks.DataShape(8, (2, 2, 2), class_num, ()), world)


# ---- files and folders -------------------------------------------------------------------------------


def test_files_are_listed_by_class_and_path_and_what_is_hidden_is_no_class(pictures):
    (pictures / ".ipynb_checkpoints").mkdir()
    (pictures / "cat" / ".DS_Store").write_text("x")
    (pictures / "cat" / "more").mkdir()
    Image.new("RGB", (8, 8)).save(pictures / "cat" / "more" / "a.JPEG")
    (pictures / "dog" / "readme.txt").write_text("x")
    files = ClassFolders.scan(pictures, (".png", ".jpeg"))
    below = [(os.path.relpath(path, pictures), label) for path, label in files.samples]
    cats = ["cat/0.png", "cat/1.png", "cat/2.png", "cat/more/a.JPEG"]
    dogs = ["dog/0.png", "dog/1.png", "dog/2.png"]
    assert below == [*((c, 0) for c in cats), *((d, 1) for d in dogs)]
    assert files.classes == ("cat", "dog")
    assert (files.skipped, files.skipped_path) == (1, str(pictures / "dog" / "readme.txt"))
    assert files.sizes.tolist() == [os.path.getsize(path) for path, _ in files.samples]


def test_skipped_files_and_untrained_classes_are_reported_once(pictures, capsys):
    (pictures / "cat" / "readme.txt").write_text("x")
    flags = {"use_cached": False, "cached_path": None, "class_num": 1000}
    opened(pictures, World(rank=1, size=2), **flags)
    assert capsys.readouterr().err == ""
    opened(pictures, World(rank=0, size=2), **flags)
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 2
    assert "1 file(s) of another kind are not used, such as" in notes[1]
    assert "the data have 2 classes, the model 1000" in notes[0]


# ---- images ------------------------------------------------------------------------------------------


def damage(path):
    path.write_bytes(path.read_bytes()[:40])


def test_the_first_file_of_each_class_is_read_and_with_check_data_every_one(pictures):
    damage(pictures / "dog" / "2.png")
    opened(pictures, use_cached=False)
    with pytest.raises(UserError, match=r"dog/2\.png cannot be read as an image"):
        opened(pictures, use_cached=False, check_data=True)
    damage(pictures / "dog" / "0.png")
    with pytest.raises(UserError, match=r"dog/0\.png cannot be read as an image"):
        opened(pictures, use_cached=False)
    with pytest.raises(UserError, match=r"2 of 6 files cannot be used: .*0\.png, .*2\.png; the"):
        opened(pictures, use_cached=False, check_data=True)


def test_the_processes_share_the_files_to_be_checked(pictures):
    damage(pictures / "dog" / "2.png")  # the last of six files
    data = ImageFolder(pictures, 8)
    checks.check_files(data, World(rank=0, size=2), every=True)
    with pytest.raises(UserError, match=r"dog/2\.png"):
        checks.check_files(data, World(rank=1, size=2), every=True)


# ---- latents -----------------------------------------------------------------------------------------


def test_the_files_of_the_original_load(latents):
    data = opened(latents)
    assert isinstance(data, CachedTensors)
    moments, labels = data.batch([(0, False), (11, True)])
    assert labels.tolist() == [0, 1]
    assert moments.unique().tolist() == [-15, 0]


@pytest.mark.parametrize("in_memory", [True, False])
def test_one_latent_of_another_shape_is_found_by_its_length_before_training(latents, in_memory):
    odd = latents / "n01443537" / NAMES[4]
    write_latent(odd, (4, 3, 3))
    assert checks.unusual(CachedFolder(latents)) == [10]
    with pytest.raises(
        UserError, match=rf"{odd} holds moments \(4, 3, 3\), the model needs \(4, 2, 2\)"
    ):
        opened(latents, cache_in_memory=in_memory)


def test_compressed_latents_may_differ_in_length(latents):
    for i, path in enumerate(sorted(latents.rglob("*.npz"))):
        moments = np.random.default_rng(i).normal(size=SHAPE).round(i).astype(np.float32)
        np.savez_compressed(path, moments=moments, moments_flip=moments)
    assert len(checks.unusual(CachedFolder(latents))) > 3
    assert len(opened(latents, cache_in_memory=False)) == 12


def test_nan_is_found_where_it_is_read(latents):
    bad = latents / "n01443537" / NAMES[3]
    write_latent(bad, moments_flip=np.full(SHAPE, np.nan, dtype=np.float32))
    data = opened(latents, cache_in_memory=False)
    assert torch.isfinite(data[(9, False)][0]).all()
    for flags in ({"cache_in_memory": True}, {"check_data": True, "cache_in_memory": False}):
        with pytest.raises(UserError, match=f"{bad} holds NaN or infinity"):
            opened(latents, **flags)


@pytest.mark.parametrize("kind", ["bare array", "text", "one mirroring"])
def test_what_is_not_a_cached_latent_is_named(latents, kind):
    path = latents / "n01440764" / NAMES[0]
    if kind == "bare array":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif kind == "text":
        path.write_text("hello")
    else:
        np.savez(path, moments=np.zeros(SHAPE))
    with pytest.raises(UserError, match=f"{path} is not a cached latent"):
        CachedTensors(CachedFolder(latents))


# ---- classes and scale -------------------------------------------------------------------------------


def test_a_resumed_run_needs_the_classes_it_began_with(tmp_path):
    checks.record_classes(tmp_path, ("cat", "dog"))
    assert json.loads((tmp_path / "classes.json").read_text()) == ["cat", "dog"]
    checks.check_same_classes(tmp_path, ("cat", "dog"))
    checks.check_same_classes(tmp_path / "of the original", ("cat",))
    with pytest.raises(UserError, match="label 0 was class 'cat' and is 'bird' now"):
        checks.check_same_classes(tmp_path, ("bird", "cat", "dog"))
    with pytest.raises(UserError, match="began with 2 classes, now there are 3"):
        checks.check_same_classes(tmp_path, ("cat", "dog", "eel"))


def test_latents_far_from_a_deviation_of_one_are_reported_with_the_right_scale(capsys):
    latents = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    checks.check_spread(latents, 0.2325, World())
    assert capsys.readouterr().err == ""
    checks.check_spread(10 * latents, 1.0, World())
    assert "try --latent_scale 0.1" in capsys.readouterr().err


def test_some_items_are_spread_over_the_classes(latents):
    for in_memory in (True, False):
        data = opened(latents, cache_in_memory=in_memory)
        assert checks.some_items(data, 3)[:, 0, 0, 0].tolist() == [0, 5, 15]
        assert checks.some_items(data, 100).shape == (12, *SHAPE)
