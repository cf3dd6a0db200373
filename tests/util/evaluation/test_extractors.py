"""The feature extractors: Inception's weights and layers, the classifier of the shapes."""

import os
import pickle
from urllib.error import URLError

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.utils import create_feature_extractor

from tests.support.scoring import features_of, pictures, refused, request
from util import metrics
from util.errors import UserError
from util.evaluation.image_source import Pictures
from util.evaluation.statistics import FidStatistics, save_stats
from util.shapes import label_of, render
from util.tiny.classifier import ShapeClassifier

INCEPTION = "inception-v3-compat"
WEIGHTS_NAME = "weights-inception-2015-12-05-6726825d.pth"


def inception_stats(path):
    save_stats(path, FidStatistics(np.zeros(2048, np.float32), np.eye(2048)))
    return path


def test_missing_inception_weights_offline_are_reported_with_their_path(tmp_path, monkeypatch):
    def offline(*_):
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    stats = inception_stats(tmp_path / "stats.npz")
    place = tmp_path / "torch" / "hub" / "checkpoints" / WEIGHTS_NAME
    said = refused(request(stats, features=INCEPTION, path=None))
    assert str(place) in said and "util.download inception" in said
    said = refused(request(stats, features=INCEPTION, path=str(tmp_path / "own.pth")))
    assert "own.pth are missing; `python -m util.download inception`" in said


class Payload:
    def __reduce__(self):
        return os.mkdir, ("code_was_run",)


def test_inception_weights_that_would_run_code_are_refused_and_do_not_run_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"fc.weight": Payload()}, tmp_path / "zip.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Payload(), protocol=2))
    stats = inception_stats(tmp_path / "stats.npz")
    for name in ("zip.pth", "plain.pth"):
        assert name in refused(request(stats, features=INCEPTION, path=str(tmp_path / name)))
    assert not (tmp_path / "code_was_run").exists()


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Weights of Inception's shapes but random values, saved as torch-fidelity's file is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr(torch, "load", lambda *_, **__: {})
        torch.manual_seed(0)
        network = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path="x")
    path = tmp_path_factory.mktemp("inception") / WEIGHTS_NAME
    torch.save(network.state_dict(), path)
    return path


def test_inception_is_found_in_torch_hub_and_gives_torch_fidelitys_features(
    tmp_path, monkeypatch, inception_file
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = tmp_path / "hub" / "checkpoints" / WEIGHTS_NAME
    place.parent.mkdir(parents=True)
    os.link(inception_file, place)
    images = pictures(2, size=16)
    ours = features_of(Pictures(images), name=INCEPTION)
    network = create_feature_extractor(
        INCEPTION,
        ["2048", "logits_unbiased"],
        cuda=False,
        feature_extractor_weights_path=str(inception_file),
        verbose=False,
    )
    theirs = network(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous())
    assert [values.shape for values in ours.values()] == [(2, 2048), (2, 1008)]
    spatial = metrics.Extractor(INCEPTION, None, "cpu", spatial=True)
    batch = torch.from_numpy(images).permute(0, 3, 1, 2)
    assert spatial(batch)["spatial"].shape == (2, 7 * 17 * 17)  # ADM's sFID
    assert all(torch.equal(a, b) for a, b in zip(ours.values(), theirs, strict=True))


def test_a_truncated_inception_file_and_another_network_are_refused_by_name(
    tmp_path, inception_file
):
    with open(inception_file, "rb") as file:
        (tmp_path / "cut.pth").write_bytes(file.read(1 << 20))
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    stats = inception_stats(tmp_path / "stats.npz")
    for name in ("cut.pth", "other.pth"):
        assert name in refused(request(stats, features=INCEPTION, path=str(tmp_path / name)))


@pytest.fixture
def classifier_file(tmp_path):
    torch.manual_seed(0)
    save_file(ShapeClassifier().state_dict(), tmp_path / "classifier.safetensors")
    return str(tmp_path / "classifier.safetensors")


def test_the_shapes_extractor_gives_features_and_accuracy(tmp_path, classifier_file):
    images = Pictures(np.stack([render(i) for i in range(20)]))
    stats = tmp_path / "stats.npz"
    made = metrics.make_stats(images, "shapes", classifier_file, stats, "cpu")
    assert (made.features, made.num_images, made.mu.shape) == ("shapes", 20, (64,))
    metrics.check_ready(request(stats, features="shapes", path=classifier_file))
    batch = torch.stack([images[i] for i in range(20)])
    features, logits = ShapeClassifier.from_file(classifier_file)(batch)
    extracted = features_of(images, 20, "shapes", classifier_file)
    assert torch.equal(extracted["64"], features) and torch.equal(extracted["logits"], logits)
    labels = [label_of(i) for i in range(20)]
    result = metrics.score(
        images, 20, request(stats, features="shapes", path=classifier_file), "cpu", labels=labels
    )
    right = logits.argmax(1) == torch.tensor(labels)
    assert result["accuracy"] == right.double().mean().item()
    assert abs(result["fid"]) < 1e-4


def test_the_shapes_extractor_needs_its_file_and_image_size(tmp_path, classifier_file):
    stats = tmp_path / "stats.npz"
    save_stats(stats, FidStatistics(np.zeros(64, np.float32), np.eye(64)))
    absent = request(stats, features="shapes", path=str(tmp_path / "absent.safetensors"))
    assert "absent.safetensors is missing" in refused(absent)
    with pytest.raises(UserError, match="64x64 images, got 8x8"):
        features_of(Pictures(pictures(2)), 2, "shapes", classifier_file)
