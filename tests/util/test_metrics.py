"""Scores equal torch-fidelity's own, and what would spoil them is refused in one sentence."""

import os

import numpy as np
import pytest
import torch
from torch.utils.data import StackDataset
from torch_fidelity import calculate_metrics
from torch_fidelity.metric_isc import isc_features_to_metric

from tests.support.assertions import refusal
from tests.support.scoring import (
    ToyExtractor,
    features_of,
    pictures,
    refused,
    request,
    toy_score,
    toy_stats,
    write_pictures,
)
from util import metrics
from util.errors import UserError
from util.evaluation.image_source import Pictures, image_batches
from util.evaluation.request import METRICS
from util.evaluation.statistics import load_stats
from util.images import png_name, save_png


def test_scores_of_two_folders_equal_torch_fidelitys_own(tmp_path):
    ours = write_pictures(tmp_path / "ours", pictures(37, seed=1))
    reference = write_pictures(tmp_path / "reference", pictures(50, seed=2))
    stats = tmp_path / "stats.npz"
    metrics.make_stats(reference, "toy", None, stats, "cpu", batch_size=16, keep_features=True)
    asked = request(stats, "fid", "isc", "kid", "pr")
    result = metrics.score(ours, 37, asked, "cpu", batch_size=16)
    expected = calculate_metrics(
        input1=str(ours),
        input2=str(reference),
        fid=True,
        isc=True,
        kid=True,
        kid_subset_size=37,
        prc=True,
        feature_extractor="toy",
        batch_size=16,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    # torch-fidelity's mean is summed in float32, ours in float64
    assert result.pop("reference").startswith("toy stats.npz ")
    assert result == {
        "fid": pytest.approx(expected["frechet_inception_distance"], rel=1e-5),
        "is_mean": pytest.approx(expected["inception_score_mean"], rel=1e-12),
        "is_std": pytest.approx(expected["inception_score_std"], rel=1e-9),
        "is_splits": 10,
        "kid_mean": expected["kernel_inception_distance_mean"],
        "kid_std": expected["kernel_inception_distance_std"],
        "kid_subset": 37,
        "precision": expected["precision"],
        "recall": expected["recall"],
    }
    assert result["fid"] > 0.01 and result["is_mean"] > 1.01 and result["is_std"] > 0
    assert 0 < result["precision"] < 1 and 0 < result["recall"] < 1 and result["kid_std"] > 0


def test_sfid_is_the_distance_of_seven_channels_in_the_order_of_adm(tmp_path):
    ours, reference = pictures(60, seed=1), pictures(80, seed=2)
    stats = toy_stats(tmp_path / "stats.npz", reference)
    network = ToyExtractor("toy", ["8"])
    (_, images), *_ = image_batches(Pictures(reference), 80)
    thumbnail = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 4)
    maps = network.spatial(thumbnail).detach()  # (80, 9, 4, 4)
    flat = maps[:, :7].permute(0, 2, 3, 1).reshape(80, -1).double().numpy()
    found = load_stats(stats)
    assert np.allclose(found.mu_s, flat.mean(0)) and np.allclose(found.sigma_s, np.cov(flat.T))
    assert abs(metrics.score(Pictures(reference), 80, request(stats, "sfid"), "cpu")["sfid"]) < 1e-4
    assert metrics.score(Pictures(ours), 60, request(stats, "sfid"), "cpu")["sfid"] > 1e-3


def test_a_reference_batch_of_adm_serves_for_all_metrics(tmp_path):
    reference, ours = pictures(50, seed=2), Pictures(pictures(37, seed=1))
    kept = tmp_path / "kept.npz"
    metrics.make_stats(Pictures(reference), "toy", None, kept, "cpu", keep_features=True)
    names = ("mu", "sigma", "mu_s", "sigma_s")
    virtual = {name: getattr(load_stats(kept), name) for name in names}
    np.savez(tmp_path / "virtual.npz", arr_0=reference, arr_1=np.arange(50), **virtual)
    expected = metrics.score(ours, 37, request(kept, *METRICS), "cpu")
    result = metrics.score(ours, 37, request(tmp_path / "virtual.npz", *METRICS), "cpu")
    assert result.pop("reference") != expected.pop("reference")
    assert result == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("wanted", "missing"), [("kid", "images"), ("pr", "images"), ("sfid", "mu_s")]
)
def test_statistics_without_what_a_metric_needs_are_refused_first(tmp_path, wanted, missing):
    np.savez(tmp_path / "stats.npz", mu=np.zeros(8), sigma=np.eye(8))
    assert missing in refused(request(tmp_path / "stats.npz", "fid", wanted))


def test_statistics_in_float64_as_adm_publishes_them_give_the_same_fid(tmp_path):
    stats = load_stats(toy_stats(tmp_path / "ours.npz", pictures(50, seed=2)))
    np.savez(tmp_path / "adm.npz", mu=stats.mu.astype(np.float64), sigma=stats.sigma)
    images = Pictures(pictures(20))
    ours, adm = (toy_score(images, 20, tmp_path / f"{name}.npz") for name in ("ours", "adm"))
    assert ours["fid"] == adm["fid"]


def test_the_fid_of_the_reference_images_themselves_is_zero(tmp_path):
    images = pictures(60)
    stats = toy_stats(tmp_path / "stats.npz", images)
    assert abs(toy_score(Pictures(images), 60, stats)["fid"]) < 1e-5
    assert toy_score(Pictures(images // 2), 60, stats)["fid"] > 0.1


def test_a_folder_a_dataset_and_a_dataset_with_labels_give_equal_features(tmp_path):
    images = pictures(11)
    sources = [
        write_pictures(tmp_path / "images", images),
        Pictures(images),
        StackDataset(Pictures(images), range(11)),
    ]
    first, *others = (features_of(s, 4) for s in sources)
    assert {layer: tuple(values.shape) for layer, values in first.items()} == {
        "8": (11, 8),
        "logits": (11, 4),
    }
    for other in others:
        assert all(torch.equal(first[layer], other[layer]) for layer in first)


def test_sums_of_shards_in_any_order_score_as_the_whole(tmp_path):
    images, stats = pictures(24), tmp_path / "stats.npz"
    metrics.make_stats(Pictures(pictures(30, seed=2)), "toy", None, stats, "cpu", 64, None, True)
    asked, labels = request(stats, *METRICS), list(range(4)) * 6
    first, second, third = (metrics.Scorer(asked, 24, "cpu", labels) for _ in range(3))
    first.add(Pictures(images), range(5, 24))
    second.add(Pictures(images), range(2))
    third.update([4, 2, 3], torch.from_numpy(images[[4, 2, 3]]).permute(0, 3, 1, 2))
    second.sums.merge(first.sums.sums)
    second.sums.merge(third.sums.sums)
    second.sums.merge({})  # of a process that had nothing to do
    whole = metrics.score(Pictures(images), 24, asked, "cpu", labels=labels)
    merged = second.result()
    assert merged.pop("reference") == whole.pop("reference")
    assert merged == pytest.approx(whole, rel=1e-6)
    with pytest.raises(UserError, match="19 of 24 images are scored"):
        first.result()


def test_scoring_draws_nothing_from_torchs_random_generator(tmp_path):
    stats = toy_stats(tmp_path / "stats.npz", pictures(30, seed=2))
    folder = write_pictures(tmp_path / "images", pictures(12))
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    toy_score(folder, 12, stats)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1])


def test_fewer_images_than_splits_are_scored_in_one_split_and_the_result_says_so(tmp_path):
    stats = toy_stats(tmp_path / "stats.npz", pictures(30, seed=2))
    images = Pictures(pictures(9))
    result = toy_score(images, 9, stats)
    logits = features_of(images)["logits"]
    assert result["is_splits"] == 1 and result["is_std"] == 0
    assert result["is_mean"] == isc_features_to_metric(logits, 1)["inception_score_mean"]
    assert toy_score(Pictures(pictures(10)), 10, stats)["is_splits"] == 10


def test_one_image_has_no_fid(tmp_path):
    stats = toy_stats(tmp_path / "stats.npz", pictures(30, seed=2))
    with pytest.raises(UserError, match="at least 2 images, got 1"):
        toy_score(Pictures(pictures(1)), 1, stats)


def test_accuracy_is_the_share_of_images_that_show_their_label(tmp_path):
    stats = toy_stats(tmp_path / "stats.npz", pictures(30, seed=2))
    images = Pictures(pictures(10))
    labels = features_of(images)["logits"].argmax(1).tolist()
    assert toy_score(images, 10, stats, labels=labels)["accuracy"] == 1
    wrong = [label + (i < 3) for i, label in enumerate(labels)]
    assert toy_score(images, 10, stats, labels=wrong)["accuracy"] == 0.7
    assert "accuracy" not in toy_score(images, 10, stats)


def test_a_truncated_image_is_named(tmp_path):
    stats = toy_stats(tmp_path / "stats.npz", pictures(30, seed=2))
    folder = write_pictures(tmp_path / "images", pictures(12))
    broken = folder / png_name(7)
    broken.write_bytes(broken.read_bytes()[:-20])
    assert "00007.png" in refusal(lambda: toy_score(folder, 12, stats))


def test_images_of_different_sizes_are_named(tmp_path):
    folder = write_pictures(tmp_path / "images", pictures(3))
    save_png(folder / png_name(2), pictures(1, size=6)[0])
    for batch_size in (2, 3):
        with pytest.raises(UserError, match=r"00002\.png.* 6x6.*00000\.png \(8x8\)"):
            features_of(folder, batch_size)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="at least 2 images, got 0"):
        metrics.make_stats(tmp_path, "toy", None, tmp_path / "stats.npz", "cpu")


def test_missing_statistics_are_an_error_that_names_both_commands(tmp_path):
    said = refused(request(tmp_path / "adm.npz"))
    assert "adm.npz are missing" in said
    assert "util.download fid_stats" in said and "util.metrics make_stats" in said


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(8)}, "sigma"),
        ({"mu": np.zeros(8), "sigma": np.eye(7)}, "(8,) and sigma (7, 7)"),
        (
            {"mu": np.zeros(9), "sigma": np.eye(9)},
            "9-d statistics of an extractor, but toy has 8 features",
        ),
        ({"mu": np.zeros(8), "sigma": np.eye(8), "features": "shapes"}, "statistics of shapes"),
    ],
)
def test_wrong_statistics_are_refused_before_anything_is_generated(tmp_path, arrays, message):
    np.savez(tmp_path / "stats.npz", **arrays)
    assert message in refused(request(tmp_path / "stats.npz"))


def test_an_unknown_extractor_is_refused_with_the_known_names(tmp_path):
    said = refused(request(tmp_path / "stats.npz", features="inception"))
    assert "'inception'; choose one of: inception-v3-compat, shapes" in said


def run_make_stats(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["metrics", "make_stats", *map(str, arguments)])
    metrics.main()


def test_make_stats_reads_class_folders_and_crops_as_for_training(tmp_path, monkeypatch, capsys):
    images = pictures(12, size=8)
    root, output = tmp_path / "data", tmp_path / "stats.npz"
    root.mkdir()
    write_pictures(root / "a", images[:5])
    write_pictures(root / "b", images[5:])
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
