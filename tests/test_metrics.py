"""FID and IS equal torch-fidelity's own, and what would spoil them is refused in one sentence.

A toy extractor stands in for Inception: eight fixed projections of a 4x4 thumbnail.
"""

import os
import pickle
import re
from urllib.error import URLError

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import Dataset
from torch_fidelity import FeatureExtractorBase, calculate_metrics
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.utils import create_feature_extractor

from util import metrics
from util.errors import UserError
from util.fid_stats import FidStatistics, load_stats, save_stats
from util.images import png_name, save_png
from util.shape_classifier import ShapeClassifier
from util.shapes import ShapesDataset

WEIGHTS_NAME = "weights-inception-2015-12-05-6726825d.pth"


class ToyExtractor(FeatureExtractorBase):
    def __init__(self, name, features_list, **_):
        super().__init__(name, list(features_list))
        draws = torch.Generator().manual_seed(0)
        self.register_buffer("projection", torch.randn(48, 8, generator=draws))
        self.register_buffer("classes", torch.randn(8, 4, generator=draws))

    @staticmethod
    def get_provided_features_list():
        return ("8", "logits")

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return {"fid": "8", "isc": "logits"}[metric]

    @staticmethod
    def can_be_compiled():
        return False

    def forward(self, input):
        thumbnail = torch.nn.functional.adaptive_avg_pool2d(input.float() / 255, 4)
        features = thumbnail.flatten(1) @ self.projection
        layers = {"8": features, "logits": features @ self.classes}
        return tuple(layers[name] for name in self.features_list)


metrics.register_features(
    "toy", metrics.FeatureSpec("8", 8, "logits", True, lambda path: path), ToyExtractor
)


class Pictures(Dataset):
    def __init__(self, images, labels=None):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = torch.from_numpy(self.images[index]).permute(2, 0, 1)
        return image if self.labels is None else (image, self.labels[index])


def pictures(count, seed=0, size=8):
    draws = np.random.default_rng(seed)
    light = draws.integers(1, 256, (count, 1, 1, 3))
    return (draws.random((count, size, size, 3)) * light).astype(np.uint8)


def folder_of(path, images):
    path.mkdir()
    for index, image in enumerate(images):
        save_png(path / png_name(index), image)
    return path


def toy_stats(path, images):
    metrics.make_stats(Pictures(images), "toy", None, path, "cpu")
    return path


def toy_score(source, num_images, stats, **options):
    return metrics.score(source, num_images, "toy", None, stats, "cpu", **options)


def is_one_sentence(error):
    return "\n" not in str(error.value) and len(str(error.value)) < 400


def test_fid_and_is_of_two_folders_equal_torch_fidelitys_own_bitwise(tmp_path):
    ours = folder_of(tmp_path / "ours", pictures(37, seed=1))
    reference = folder_of(tmp_path / "reference", pictures(50, seed=2))
    stats = tmp_path / "stats.npz"
    metrics.make_stats(reference, "toy", None, stats, "cpu", batch_size=16)
    result = toy_score(ours, 37, stats, batch_size=16)
    expected = calculate_metrics(
        input1=str(ours),
        input2=str(reference),
        fid=True,
        isc=True,
        feature_extractor="toy",
        batch_size=16,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    assert result == {
        "fid": expected["frechet_inception_distance"],
        "is_mean": expected["inception_score_mean"],
        "is_std": expected["inception_score_std"],
        "is_splits": 10,
    }
    assert result["fid"] > 0.01 and result["is_mean"] > 1.01 and result["is_std"] > 0


def test_statistics_in_float64_as_adm_publishes_them_give_the_same_fid(tmp_path):
    stats = load_stats(toy_stats(tmp_path / "ours.npz", pictures(50, seed=2)))
    np.savez(tmp_path / "adm.npz", mu=stats.mu.astype(np.float64), sigma=stats.sigma)
    images = Pictures(pictures(20))
    ours, adm = (toy_score(images, 20, tmp_path / f"{name}.npz") for name in ("ours", "adm"))
    assert ours == adm


def test_the_fid_of_the_reference_images_themselves_is_zero(tmp_path):
    images = pictures(60)
    stats = toy_stats(tmp_path / "stats.npz", images)
    assert abs(toy_score(Pictures(images), 60, stats)["fid"]) < 1e-5
    assert toy_score(Pictures(images // 2), 60, stats)["fid"] > 0.1


def test_a_folder_a_dataset_and_a_dataset_with_labels_give_equal_features(tmp_path):
    images = pictures(11)
    sources = [
        folder_of(tmp_path / "images", images),
        Pictures(images),
        Pictures(images, labels=list(range(11))),
    ]
    first, *others = (metrics.extract_features(s, "toy", None, "cpu", 4) for s in sources)
    assert {layer: tuple(values.shape) for layer, values in first.items()} == {
        "8": (11, 8),
        "logits": (11, 4),
    }
    for other in others:
        assert all(torch.equal(first[layer], other[layer]) for layer in first)


def test_features_extracted_in_shards_score_as_the_whole(tmp_path):
    images = pictures(24)
    stats = toy_stats(tmp_path / "stats.npz", pictures(30, seed=2))
    shards = [
        metrics.extract_features(Pictures(images[part]), "toy", None, "cpu", 4)
        for part in (slice(0, 8), slice(8, 24))
    ]
    gathered = {layer: torch.cat([shard[layer] for shard in shards]) for layer in shards[0]}
    assert metrics.score_features(gathered, "toy", stats) == toy_score(
        Pictures(images), 24, stats, batch_size=4
    )


def test_scoring_draws_nothing_from_torchs_random_generator(tmp_path):
    stats = toy_stats(tmp_path / "stats.npz", pictures(30, seed=2))
    folder = folder_of(tmp_path / "images", pictures(12))
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    toy_score(folder, 12, stats)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1])


def test_fewer_images_than_splits_are_scored_in_one_split_and_the_result_says_so(tmp_path):
    stats = toy_stats(tmp_path / "stats.npz", pictures(30, seed=2))
    images = Pictures(pictures(9))
    result = toy_score(images, 9, stats)
    logits = metrics.extract_features(images, "toy", None, "cpu")["logits"]
    assert result["is_splits"] == 1 and result["is_std"] == 0
    assert result["is_mean"] == isc_features_to_metric(logits, 1)["inception_score_mean"]
    assert toy_score(Pictures(pictures(10)), 10, stats)["is_splits"] == 10


def test_one_image_has_no_fid(tmp_path):
    stats = toy_stats(tmp_path / "stats.npz", pictures(30, seed=2))
    with pytest.raises(UserError, match="at least 2 images, got 1"):
        toy_score(Pictures(pictures(1)), 1, stats)


def test_accuracy_is_the_share_of_images_that_show_their_label(tmp_path):
    logits = torch.tensor([[0.0, 1.0], [2.0, 1.0], [0.0, 3.0], [5.0, 1.0]])
    assert metrics.accuracy(logits, [1, 0, 1, 0]) == 1
    assert metrics.accuracy(logits, torch.tensor([1, 0, 0, 1])) == 0.5
    with pytest.raises(ValueError, match="labels"):
        metrics.accuracy(logits, [1, 0])
    stats = toy_stats(tmp_path / "stats.npz", pictures(30, seed=2))
    images = Pictures(pictures(10))
    labels = metrics.extract_features(images, "toy", None, "cpu")["logits"].argmax(1)
    assert toy_score(images, 10, stats, labels=labels)["accuracy"] == 1
    assert "accuracy" not in toy_score(images, 10, stats)


def test_another_number_of_images_than_asked_is_refused_with_both(tmp_path):
    stats = toy_stats(tmp_path / "stats.npz", pictures(30, seed=2))
    folder = folder_of(tmp_path / "images", pictures(12))
    for source in (folder, Pictures(pictures(12))):
        with pytest.raises(UserError, match="12 images, but 50 are") as error:
            toy_score(source, 50, stats)
        assert is_one_sentence(error)


def test_a_truncated_image_is_named(tmp_path):
    stats = toy_stats(tmp_path / "stats.npz", pictures(30, seed=2))
    folder = folder_of(tmp_path / "images", pictures(12))
    broken = folder / png_name(7)
    broken.write_bytes(broken.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"00007\.png") as error:
        toy_score(folder, 12, stats)
    assert is_one_sentence(error)


def test_images_of_different_sizes_are_named(tmp_path):
    folder = folder_of(tmp_path / "images", pictures(3))
    save_png(folder / png_name(2), pictures(1, size=6)[0])
    for batch_size in (2, 3):
        with pytest.raises(UserError, match=r"00002\.png.* 6x6.*00000\.png \(8x8\)"):
            metrics.extract_features(folder, "toy", None, "cpu", batch_size)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="no PNG or JPEG images"):
        metrics.extract_features(tmp_path, "toy", None, "cpu")


def test_missing_statistics_are_an_error_that_names_both_commands(tmp_path):
    with pytest.raises(UserError, match="adm.npz are missing") as error:
        metrics.check_ready("toy", None, tmp_path / "adm.npz")
    assert "util.download fid_stats" in str(error.value) and is_one_sentence(error)
    assert "util.metrics make_stats" in str(error.value)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(8)}, "sigma"),
        ({"mu": np.zeros(8), "sigma": np.eye(7)}, r"\(8,\) and sigma \(7, 7\)"),
        ({"mu": np.zeros((8, 1)), "sigma": np.eye(8)}, r"\(8, 1\)"),
        ({"mu": np.full(8, np.nan), "sigma": np.eye(8)}, "NaN"),
        ({"mu": np.zeros(9), "sigma": np.eye(9)}, "9-d.*toy has 8 features"),
        ({"mu": np.zeros(8), "sigma": np.eye(8), "features": "shapes"}, "statistics of shapes"),
        ({"mu": np.array([print] * 8), "sigma": np.eye(8)}, "no file of FID statistics"),
    ],
)
def test_wrong_statistics_are_refused_before_anything_is_generated(tmp_path, arrays, message):
    np.savez(tmp_path / "stats.npz", **arrays)
    with pytest.raises(UserError, match=message) as error:
        metrics.check_ready("toy", None, tmp_path / "stats.npz")
    assert is_one_sentence(error)


def test_a_file_that_is_no_npz_is_refused_as_statistics(tmp_path):
    stats = toy_stats(tmp_path / "stats.npz", pictures(30))
    data = stats.read_bytes()
    for wrong in (data[:100], b"", b"<html>not found</html>"):
        stats.write_bytes(wrong)
        with pytest.raises(UserError, match="no file of FID statistics"):
            metrics.check_ready("toy", None, stats)
    with open(stats, "wb") as file:
        np.save(file, np.zeros(8))
    with pytest.raises(UserError, match="no file of FID statistics"):
        metrics.check_ready("toy", None, stats)


def test_an_unknown_extractor_is_refused_with_the_known_names(tmp_path):
    with pytest.raises(UserError, match="'inception'.*inception-v3-compat, shapes"):
        metrics.check_ready("inception", None, tmp_path / "stats.npz")


def inception_stats(path):
    save_stats(path, FidStatistics(np.zeros(2048, np.float32), np.eye(2048)))
    return path


def test_missing_inception_weights_offline_are_an_error_that_says_where_they_go(
    tmp_path, monkeypatch
):
    def offline(*_):
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    stats = inception_stats(tmp_path / "stats.npz")
    place = tmp_path / "torch" / "hub" / "checkpoints" / WEIGHTS_NAME
    with pytest.raises(UserError, match=re.escape(str(place))) as error:
        metrics.check_ready("inception-v3-compat", None, stats)
    assert "util.download inception" in str(error.value) and is_one_sentence(error)
    with pytest.raises(UserError, match="own.pth are missing; `python -m util.download inception`"):
        metrics.check_ready("inception-v3-compat", str(tmp_path / "own.pth"), stats)


class Payload:
    def __reduce__(self):
        return os.mkdir, ("code_was_run",)


def test_inception_weights_that_would_run_code_are_refused_and_do_not_run_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"fc.weight": Payload()}, tmp_path / "zip.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Payload(), protocol=2))
    stats = inception_stats(tmp_path / "stats.npz")
    for name in ("zip.pth", "plain.pth"):
        with pytest.raises(UserError, match=name) as error:
            metrics.check_ready("inception-v3-compat", str(tmp_path / name), stats)
        assert is_one_sentence(error)
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
    ours = metrics.extract_features(Pictures(images), "inception-v3-compat", None, "cpu")
    network = create_feature_extractor(
        "inception-v3-compat",
        ["2048", "logits_unbiased"],
        cuda=False,
        feature_extractor_weights_path=str(inception_file),
        verbose=False,
    )
    theirs = network(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous())
    assert [values.shape for values in ours.values()] == [(2, 2048), (2, 1008)]
    assert all(torch.equal(a, b) for a, b in zip(ours.values(), theirs, strict=True))


def test_a_truncated_inception_file_is_refused_by_name(tmp_path, inception_file):
    with open(inception_file, "rb") as file:
        (tmp_path / "cut.pth").write_bytes(file.read(1 << 20))
    stats = inception_stats(tmp_path / "stats.npz")
    with pytest.raises(UserError, match=r"cut\.pth") as error:
        metrics.check_ready("inception-v3-compat", str(tmp_path / "cut.pth"), stats)
    assert is_one_sentence(error)


def test_weights_of_another_network_are_refused_in_one_sentence(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    stats = inception_stats(tmp_path / "stats.npz")
    with pytest.raises(UserError, match=r"other\.pth") as error:
        metrics.check_ready("inception-v3-compat", str(tmp_path / "other.pth"), stats)
    assert is_one_sentence(error)


@pytest.fixture
def classifier_file(tmp_path):
    torch.manual_seed(0)
    save_file(ShapeClassifier().state_dict(), tmp_path / "classifier.safetensors")
    return str(tmp_path / "classifier.safetensors")


def test_the_shapes_extractor_gives_the_classifiers_features_and_accuracy(
    tmp_path, classifier_file
):
    images = ShapesDataset(0, 20)
    stats = tmp_path / "stats.npz"
    made = metrics.make_stats(images, "shapes", classifier_file, stats, "cpu")
    assert (made.features, made.num_images, made.mu.shape) == ("shapes", 20, (64,))
    metrics.check_ready("shapes", classifier_file, stats)
    batch = torch.stack([image for image, _ in images])
    features, logits = ShapeClassifier.from_file(classifier_file)(batch)
    extracted = metrics.extract_features(images, "shapes", classifier_file, "cpu")
    assert torch.equal(extracted["64"], features) and torch.equal(extracted["logits"], logits)
    labels = [label for _, label in images]
    result = metrics.score(images, 20, "shapes", classifier_file, stats, "cpu", labels=labels)
    assert result["accuracy"] == metrics.accuracy(logits, labels)
    assert abs(result["fid"]) < 1e-4


def test_the_shapes_extractor_without_its_file_or_for_other_sizes_is_refused(
    tmp_path, classifier_file
):
    stats = tmp_path / "stats.npz"
    save_stats(stats, FidStatistics(np.zeros(64, np.float32), np.eye(64)))
    for path in (None, str(tmp_path / "absent.safetensors")):
        with pytest.raises(UserError, match="shapes classifier .*is missing"):
            metrics.check_ready("shapes", path, stats)
    with pytest.raises(UserError, match="64x64 images, got 8x8"):
        metrics.extract_features(Pictures(pictures(2)), "shapes", classifier_file, "cpu")


def run_make_stats(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["metrics", "make_stats", *map(str, arguments)])
    metrics.main()


def test_make_stats_reads_class_folders_and_crops_as_for_training(tmp_path, monkeypatch, capsys):
    images = pictures(12, size=8)
    root, output = tmp_path / "data", tmp_path / "stats.npz"
    root.mkdir()
    folder_of(root / "a", images[:5])
    folder_of(root / "b", images[5:])
    wide = np.pad(images[11], ((0, 0), (2, 2), (0, 0)))  # the middle of it is the image
    save_png(root / "b" / png_name(6), wide)
    flags = ["--data_path", root, "--features", "toy", "--output", output, "--device", "cpu"]
    with pytest.raises(UserError, match="--img_size"):
        run_make_stats(monkeypatch, *flags)
    assert not output.exists()
    run_make_stats(monkeypatch, *flags, "--img_size", 8)
    assert "toy, 12 images, 8 features" in capsys.readouterr().out
    expected = load_stats(toy_stats(tmp_path / "expected.npz", images))
    stats = load_stats(output)
    assert np.array_equal(stats.mu, expected.mu) and np.array_equal(stats.sigma, expected.sigma)
    assert (stats.num_images, stats.features) == (12, "toy")
    assert sorted(os.listdir(tmp_path)) == ["data", "expected.npz", "stats.npz"]


def test_make_stats_refuses_an_output_folder_that_is_missing_before_it_reads_images(tmp_path):
    with pytest.raises(UserError, match=r"folder of .*stats\.npz does not exist"):
        metrics.make_stats(tmp_path / "no_data", "toy", None, tmp_path / "no" / "stats.npz", "cpu")
