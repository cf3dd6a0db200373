"""The shape classifier and the FID statistics made with it: right, deterministic, and bundled."""

import shutil

import numpy as np
import pytest
import torch

from tests.support import ROOT
from util.errors import UserError
from util.shapes import HELD_OUT_START
from util.shapes import pictures as shapes
from util.tiny.assets import load_tokenizer, make_stats, make_tokenizer, restore
from util.tiny.classifier import ShapeClassifier

FOLDER = ROOT / "pretrained_models" / "mar_tiny"
UNSEEN = HELD_OUT_START + 500_000  # neither trained on nor in the statistics


@pytest.fixture(scope="module")
def classifier():
    return ShapeClassifier.from_file(FOLDER / "classifier.safetensors")


@pytest.fixture(scope="module")
def pictures():
    return shapes(UNSEEN, 500)


LABELS = torch.arange(500) % 10


def test_held_out_pictures_are_classified(classifier, pictures):
    assert (classifier(pictures)[1].argmax(1) == LABELS).float().mean() > 0.995


def test_held_out_pictures_are_classified_through_the_tokenizer(classifier, pictures):
    restored = restore(load_tokenizer(FOLDER / "tokenizer.safetensors"), pictures)
    assert (classifier(restored)[1].argmax(1) == LABELS).float().mean() > 0.995


def test_features_have_a_mean_variance_of_one(classifier, pictures):
    features, logits = classifier(pictures)
    assert features.shape == (500, 64) and logits.shape == (500, 10)
    assert features.var(0).mean().item() == pytest.approx(1, abs=0.1)


def test_bytes_and_floats_give_the_same(classifier, pictures):
    for of_bytes, of_floats in zip(
        classifier(pictures[:4]), classifier(pictures[:4].float() / 127.5 - 1), strict=True
    ):
        assert torch.allclose(of_bytes, of_floats, atol=1e-4)


def test_features_do_not_depend_on_the_batch_or_the_mode(classifier, pictures):
    alone = torch.cat([classifier(pictures[n : n + 1])[0] for n in range(8)])
    assert torch.allclose(classifier(pictures[:8])[0], alone, atol=1e-4)
    trained = ShapeClassifier.from_file(FOLDER / "classifier.safetensors").train()
    assert torch.equal(trained(pictures[:8])[0], classifier(pictures[:8])[0])


def test_another_picture_size_is_refused(classifier):
    with pytest.raises(ValueError, match="64, 64"):
        classifier(torch.zeros(1, 3, 32, 32))


def test_the_bundled_statistics_are_those_of_the_bundled_classifier(classifier, pictures):
    with np.load(FOLDER / "fid_stats.npz", allow_pickle=False) as stats:
        mu, sigma = stats["mu"], stats["sigma"]
    features = classifier(pictures)[0].double().numpy()
    assert mu.dtype == sigma.dtype == np.float64
    assert np.abs(features.mean(0) - mu).max() < 6 * np.sqrt(sigma.diagonal().max() / 500)
    assert np.trace(sigma) == pytest.approx(np.trace(np.cov(features, rowvar=False)), rel=0.1)


def test_statistics_are_mean_and_covariance_of_the_held_out_features(classifier, tmp_path):
    shutil.copy(FOLDER / "classifier.safetensors", tmp_path)
    make_stats(tmp_path, 100)
    features = classifier(shapes(HELD_OUT_START, 100))[0].double()
    with np.load(tmp_path / "fid_stats.npz", allow_pickle=False) as stats:
        assert np.allclose(stats["mu"], features.mean(0), atol=1e-4)
        assert np.allclose(stats["sigma"], features.T.cov(), atol=1e-3)
    assert not list(tmp_path.glob("*.part"))


def test_statistics_of_unequal_classes_are_refused(tmp_path):
    with pytest.raises(UserError, match="multiple of 10"):
        make_stats(tmp_path, 105)


def test_the_tokenizer_command_makes_one_as_good_as_the_bundled_one(tmp_path):
    made = make_tokenizer(tmp_path, 500)
    bundled = load_tokenizer(FOLDER / "tokenizer.safetensors")
    assert made["latent_scale"] == pytest.approx(bundled.latent_scale, rel=0.02)
    assert made["held_out_psnr_db"] > 33.5
    assert load_tokenizer(tmp_path / "tokenizer.safetensors").latent_scale == made["latent_scale"]


def test_a_missing_classifier_says_how_to_make_it(tmp_path):
    with pytest.raises(UserError, match=r"util\.tiny\.assets classifier"):
        ShapeClassifier.from_file(tmp_path / "classifier.safetensors")


@pytest.mark.parametrize("damage", ["truncated", "foreign"])
def test_a_damaged_or_foreign_classifier_is_refused_in_one_line(tmp_path, damage):
    path = FOLDER / "tokenizer.safetensors"
    if damage == "truncated":
        path = tmp_path / "classifier.safetensors"
        path.write_bytes((FOLDER / "classifier.safetensors").read_bytes()[:5000])
    with pytest.raises(UserError, match="not a shape classifier") as caught:
        ShapeClassifier.from_file(path)
    assert "\n" not in str(caught.value)
