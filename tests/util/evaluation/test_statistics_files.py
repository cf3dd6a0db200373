"""Statistics files that are damaged anywhere are refused before the first image is made."""

import zipfile

import numpy as np
import pytest

from tests.support import ROOT
from tests.support.assertions import refusal
from util import metrics
from util.errors import UserError
from util.evaluation.request import ScoreRequest
from util.evaluation.statistics import check_images, load_images, load_stats

CLASSIFIER = str(ROOT / "pretrained_models/mar_tiny/classifier.safetensors")
IMAGES = np.arange(5 * 64 * 64 * 3, dtype=np.uint32).astype(np.uint8).reshape(5, 64, 64, 3)
GAUSSIAN = {"mu": np.zeros(64), "sigma": np.eye(64)}
WHOLE = {**GAUSSIAN, "mu_s": np.ones(3), "sigma_s": np.eye(3)}
WHOLE |= {"num_images": 9, "features": "shapes"}


def request(path, *wanted):
    return ScoreRequest("shapes", CLASSIFIER, path, wanted)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=["stored", "compressed"])
def test_flipped_bytes_anywhere_are_refused_or_change_nothing(tmp_path, save):
    path = tmp_path / "stats.npz"
    save(path, **WHOLE)
    data, whole = path.read_bytes(), load_stats(path)
    refused = 0
    for start in range(0, len(data), max(1, len(data) // 150)):
        wrong = bytearray(data)
        for i in range(start, min(start + 3, len(data))):
            wrong[i] ^= 0x5A
        path.write_bytes(wrong)
        try:
            found = load_stats(path)
        except UserError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            assert np.array_equal(found.mu, whole.mu)
            assert np.array_equal(found.sigma, whole.sigma)
    assert refused > 100


@pytest.mark.parametrize("length", [0, 1, 30, 0.5, 0.99])
def test_a_file_that_was_cut_off_is_refused(tmp_path, length):
    path = tmp_path / "stats.npz"
    np.savez_compressed(path, **WHOLE)
    data = path.read_bytes()
    path.write_bytes(data[: int(length * len(data)) if length < 1 else length])
    assert "is not a file of FID statistics" in refusal(lambda: load_stats(path))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mu": np.array(["a"] * 64)}, "mu holds <U1"),
        ({"sigma": np.eye(64) * 1j}, "sigma holds complex"),
        ({"sigma": np.full((64, 64), np.inf)}, "infinity in sigma"),
        ({"mu_s": np.full(3, np.nan)}, "NaN or infinity in mu_s"),
        ({"sigma_s": np.eye(4)}, r"sigma_s (4, 4)"),
        ({"sigma": np.tri(64)}, "sigma that is no covariance"),
        ({"sigma_s": -np.eye(3)}, "sigma_s that is no covariance"),
        ({"activations": np.zeros((7, 3))}, "activations (7, 3)"),
        ({"activations": np.full((7, 64), np.nan)}, "infinity in activations"),
        ({"num_images": np.array("many")}, "num_images holds"),
        ({"num_images": np.array([1, 2])}, "is a list"),
        ({"mu": np.array([{}] * 64)}, "is not a file of FID statistics"),
    ],
)
def test_entries_of_another_kind_are_named(tmp_path, changes, words):
    np.savez(tmp_path / "stats.npz", **{**WHOLE, **changes})
    assert words in refusal(lambda: load_stats(tmp_path / "stats.npz"))


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x80\x04K\x01.", "npy", "members"])
def test_a_file_of_another_kind_is_refused_without_advice_to_unpickle(tmp_path, content):
    path = tmp_path / "stats.npz"
    if content == "npy":
        with path.open("wb") as file:
            np.save(file, GAUSSIAN["mu"])
    elif content == "members":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("mu.npy", "text")
            archive.writestr("sigma.npy", "")
    else:
        path.write_bytes(content)
    words = refusal(lambda: load_stats(path))
    assert "is not a file of FID statistics" in words
    assert "pickle" not in words


def test_rounding_in_the_variance_of_a_constant_feature_is_no_damage(tmp_path):
    sigma = np.diag([1.0, 0.5, -1e-17])
    np.savez(tmp_path / "stats.npz", mu=np.ones(3), sigma=sigma)
    assert np.array_equal(load_stats(tmp_path / "stats.npz").sigma, sigma)
    np.savez(tmp_path / "stats.npz", mu=np.ones(3), sigma=np.diag([1.0, 0.5, -1e-4]))
    assert "no covariance" in refusal(lambda: load_stats(tmp_path / "stats.npz"))


@pytest.mark.parametrize("size", [3, 2048])
def test_spatial_features_of_another_size_are_refused_before_the_first_image(tmp_path, size):
    path = tmp_path / "stats.npz"
    big = {"mu": np.zeros(2048, np.float32), "sigma": np.eye(2048, dtype=np.float32)}
    np.savez(path, **big, mu_s=np.zeros(size), sigma_s=np.eye(size))
    wanted = ScoreRequest("inception-v3-compat", None, path, ("sfid",))
    said = refusal(lambda: metrics.check_ready(wanted, 10))
    assert f"{size} spatial features" in said and "2023" in said


@pytest.mark.parametrize("alone", ["mu_s", "sigma_s"])
def test_half_a_gaussian_is_refused(tmp_path, alone):
    np.savez(tmp_path / "stats.npz", **GAUSSIAN, **{alone: WHOLE[alone]})
    assert "only one of mu_s and sigma_s" in refusal(lambda: load_stats(tmp_path / "stats.npz"))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=["stored", "compressed"])
def test_one_flipped_byte_of_the_reference_images_is_found_before_the_first_image(tmp_path, save):
    path = tmp_path / "batch.npz"
    save(path, arr_0=IMAGES, **GAUSSIAN)
    metrics.check_ready(request(path, "fid", "kid"), 10)
    assert np.array_equal(load_images(path), IMAGES)
    data = bytearray(path.read_bytes())
    data[data.index(b"arr_0.npy") + 400] ^= 1
    path.write_bytes(data)
    assert str(path) in refusal(lambda: metrics.check_ready(request(path, "fid", "kid"), 10))
    metrics.check_ready(request(path, "fid"), 10)  # which does not read the images


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (IMAGES.astype(np.float32), "arr_0 float32 (5, 64, 64, 3)"),
        (IMAGES[..., 0], "arr_0 uint8 (5, 64, 64)"),
        (IMAGES[:0], "arr_0 uint8 (0, 64, 64, 3)"),
        (np.array([None]), "arr_0"),
        (IMAGES[:3], "more than 3 reference images"),
        (IMAGES[:, :32], "64x64 images, got 32x64"),
    ],
)
def test_reference_images_that_cannot_be_compared_are_refused(tmp_path, images, words):
    path = tmp_path / "batch.npz"
    np.savez(path, arr_0=images, **GAUSSIAN)
    assert words in refusal(lambda: metrics.check_ready(request(path, "pr"), 10))


def test_too_few_images_for_precision_and_recall_are_known_before_they_are_made(tmp_path):
    np.savez(tmp_path / "stats.npz", **GAUSSIAN, activations=np.zeros((9, 64)))
    ready = request(tmp_path / "stats.npz", "pr")
    metrics.check_ready(ready, 4)
    assert "more than 3" in refusal(lambda: metrics.check_ready(ready, 3))


def test_a_cut_array_of_images_is_refused(tmp_path):
    path = tmp_path / "batch.npz"
    np.savez(tmp_path / "whole.npz", arr_0=IMAGES)
    with zipfile.ZipFile(tmp_path / "whole.npz") as whole, zipfile.ZipFile(path, "w") as cut:
        cut.writestr("arr_0.npy", whole.read("arr_0.npy")[:-7])
    assert f"arr_0 has {IMAGES.nbytes - 7} bytes" in refusal(lambda: check_images(path))
