"""Scores of images, by the published torch-fidelity or equal to it.

FID (Heusel et al. 2017) is the Frechet distance between the Gaussian of the images' features and
that of reference images, Inception Score (Salimans et al. 2016) is computed from the logits; on
request sFID (Nash et al. 2021), KID (Binkowski et al. 2018), precision and recall (Kynkaanniemi et
al. 2019). Two numbers are comparable only if extractor and reference are the same.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.data import Dataset
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
from torch_fidelity.metric_kid import (
    KEY_METRIC_KID_MEAN,
    KEY_METRIC_KID_STD,
    kid_features_to_metric,
)
from torch_fidelity.metric_prc import (
    KEY_METRIC_PRECISION,
    KEY_METRIC_RECALL,
    prc_features_to_metric,
)
from tqdm import tqdm

from util.errors import UserError
from util.evaluation import image_source
from util.evaluation.conditions import Condition
from util.evaluation.extractors import Extractor, feature_spec
from util.evaluation.request import ScoreRequest
from util.evaluation.statistics import (
    FidStatistics,
    check_images,
    load_images,
    load_stats,
    save_stats,
)
from util.evaluation.sums import FeatureSums, Gaussian

KID_SUBSET = 1000  # images per subset, torch-fidelity's default; fewer where there are fewer


class Scorer:
    """Scores the images of a run, or one process's part of them, whose sums another can merge."""

    def __init__(
        self,
        request: ScoreRequest,
        num_images: int,
        device: str | torch.device,
        conditions: Sequence[Condition] | None = None,
        batch_size: int = 64,
    ) -> None:
        """conditions (N,) of the whole run: adds an accuracy where the extractor can judge them."""
        self.request, self.device, self.batch_size = request, device, batch_size
        spatial = "sfid" in request.metrics
        self.extractor = Extractor(request.features, request.features_path, device, spatial)
        spec = self.extractor.spec
        layers = {"features": spec.feature_layer, "logits": spec.logits_layer}
        if spatial:
            layers["spatial"] = "spatial"
        self.sums = FeatureSums(
            num_images, layers, conditions, spec.judge, request.needs_features, device
        )

    def update(self, indices: Sequence[int], images: torch.Tensor) -> None:
        """Add images (B, 3, H, W) uint8, on any device, and their indices in the run."""
        for start in range(0, len(indices), self.batch_size):
            part = slice(start, start + self.batch_size)
            self.sums.update(indices[part], self.extractor(images[part]))

    def add(self, dataset: Dataset, part: range) -> None:
        """Add the images of a dataset whose indices are in `part`."""
        with tqdm(total=len(part), desc="features", leave=False, disable=None) as bar:
            for indices, images in image_source.image_batches(dataset, self.batch_size, part):
                self.update(indices, images)
                bar.update(len(indices))

    def result(self) -> dict[str, object]:
        """The requested ones of util.evaluation.request.SCORES, and the reference.

        With fewer images than IS_SPLITS, IS is computed over all images at once (is_splits 1, is_std 0).
        UserError unless all images were added.
        """
        request, sums = self.request, self.sums
        if sums.count() != sums.num_images:
            raise UserError(f"{sums.count()} of {sums.num_images} images are scored; start again")
        if sums.num_images < 2:
            raise UserError(f"FID needs at least 2 images, got {sums.num_images}; generate more")
        reference = _load_stats_for(request)
        result: dict[str, object] = {"reference": request.reference}
        if "fid" in request.metrics:
            result["fid"] = _frechet(sums.gaussian(), Gaussian(reference.mu, reference.sigma))
        if "isc" in request.metrics:
            mean, deviation = sums.inception_score()
            result |= {"is_mean": mean, "is_std": deviation, "is_splits": sums.splits}
        result |= sums.verdicts()
        if "sfid" in request.metrics:
            assert reference.mu_s is not None and reference.sigma_s is not None
            theirs = Gaussian(reference.mu_s, reference.sigma_s)
            result["sfid"] = _frechet(sums.gaussian("spatial"), theirs)
        if request.needs_features:
            result |= self._compare_features(sums.sums["kept"], reference)
        return result

    def _compare_features(self, ours: torch.Tensor, reference: FidStatistics) -> dict[str, float]:
        """KID and precision / recall of features (N, d), by torch-fidelity."""
        if reference.activations is not None:
            theirs = torch.from_numpy(reference.activations)
        else:
            images = image_source.Pictures(load_images(self.request.stats_path))
            theirs = _features_of(images, self.extractor, self.batch_size)
        theirs, result = theirs.to(ours), {}
        if "kid" in self.request.metrics:
            subset = min(KID_SUBSET, len(ours), len(theirs))
            kid = kid_features_to_metric(ours, theirs, kid_subset_size=subset, verbose=False)
            result = {"kid_mean": kid[KEY_METRIC_KID_MEAN], "kid_std": kid[KEY_METRIC_KID_STD]}
            result["kid_subset"] = subset
        if "pr" in self.request.metrics:
            _check_neighbours(len(ours), len(theirs))
            pr = prc_features_to_metric(ours, theirs, save_cpu_ram=True, verbose=False)
            result["precision"], result["recall"] = pr[KEY_METRIC_PRECISION], pr[KEY_METRIC_RECALL]
        return result


def _check_neighbours(*counts: int) -> None:
    if min(counts) <= 3:  # torch-fidelity's default neighbourhood
        raise UserError(
            "precision and recall need more than 3 generated and more than 3 reference images"
        )


def _frechet(ours: Gaussian, theirs: Gaussian) -> float:
    first, second = (
        {"mu": g.mu.astype("float64"), "sigma": g.sigma.astype("float64")} for g in (ours, theirs)
    )
    return fid_statistics_to_metric(first, second, verbose=False)[KEY_METRIC_FID]


def _features_of(dataset: Dataset, extractor: Extractor, batch_size: int) -> torch.Tensor:
    """(N, d) float32 on the CPU."""
    batches = image_source.image_batches(dataset, batch_size)
    layer = extractor.spec.feature_layer
    return torch.cat([extractor(images)[layer].cpu() for _, images in batches])


def _load_stats_for(request: ScoreRequest) -> FidStatistics:
    spec, stats = feature_spec(request.features), load_stats(request.stats_path)
    path = request.stats_path
    if stats.features not in (None, request.features) or stats.mu.size != spec.feature_dim:
        raise UserError(
            f"{path} holds {stats.mu.size}-d statistics of {stats.features or 'an extractor'}, "
            f"but {request.features} has {spec.feature_dim} features; "
            "give the statistics made with the same extractor"
        )
    if "sfid" in request.metrics:
        if stats.mu_s is None:
            raise UserError(f"{path} has no mu_s and sigma_s for sfid: make them by make_stats")
        if spec.spatial_dim not in (None, stats.mu_s.size):
            raise UserError(
                f"{path} has {stats.mu_s.size} spatial features (mu_s), but {request.features} has "
                f"{spec.spatial_dim}: make them by make_stats"
            )
    if request.needs_features and stats.activations is None and not stats.has_images:
        raise UserError(
            f"{path} has neither features nor images (arr_0), which kid and pr need: take that of "
            "`python -m util.download adm_batch`, or make_stats --keep_features"
        )
    return stats


def check_ready(
    request: ScoreRequest, num_images: int | None = None, conditions: Iterable[Condition] = ()
) -> None:
    """Raise UserError if scoring `num_images` cannot work; call it before anything is generated.

    It reads every file that scoring needs, so damage is found before hours of sampling.
    """
    reference = _load_stats_for(request)
    for condition in set(conditions):
        feature_spec(request.features).check(condition)
    extractor = Extractor(request.features, request.features_path, "cpu", "sfid" in request.metrics)
    counts = [] if num_images is None else [num_images]
    if request.needs_features and reference.activations is not None:
        counts.append(len(reference.activations))
    elif request.needs_features:
        count, height, width, _ = check_images(request.stats_path)
        extractor(torch.zeros(1, 3, height, width, dtype=torch.uint8))  # does that size fit?
        counts.append(count)
    if "pr" in request.metrics:
        _check_neighbours(*counts)


def score(
    source: image_source.ImageSource,
    num_images: int,
    request: ScoreRequest,
    device: str | torch.device,
    batch_size: int = 64,
    labels: Sequence[Condition] | None = None,
) -> dict[str, object]:
    """Count, extract and score `num_images` generated images, see Scorer.result.

    `source` is a folder of numbered PNGs, image i in the i-th place, or a Dataset. With `labels`
    (N,) and an extractor that knows them the result has `accuracy` too.
    """
    dataset = image_source.open_source(source, num_images)
    _load_stats_for(request)
    scorer = Scorer(request, num_images, device, labels, batch_size)
    scorer.add(dataset, range(num_images))
    return scorer.result()


def make_stats(
    source: image_source.ImageSource,
    features: str,
    features_path: str | None,
    output: str | os.PathLike,
    device: str | torch.device,
    batch_size: int = 64,
    img_size: int | None = None,
    keep_features: bool = False,
) -> FidStatistics:
    """Write the reference statistics of images as an npz, see FidStatistics.

    `source` is a Dataset or a folder with images, in class folders or not; with `img_size` the
    files are resized and cropped as for training. Raises UserError, and then writes nothing.
    """
    if not Path(output).absolute().parent.is_dir():
        raise UserError(f"the folder of {output} does not exist; create it or change --output")
    if not isinstance(source, Dataset):
        source = image_source.open_reference(source, img_size)
    count = image_source.image_count(source)
    if count < 2:
        raise UserError(f"FID statistics need at least 2 images, got {count}; check the folder")
    spatial_features = feature_spec(features).spatial_module is not None
    wanted = {"fid": True, "sfid": spatial_features, "kid": keep_features}
    metrics = tuple(name for name, is_wanted in wanted.items() if is_wanted)
    request = ScoreRequest(features, features_path, output, metrics)
    scorer = Scorer(request, count, device, None, batch_size)
    scorer.add(source, range(count))
    gaussian = scorer.sums.gaussian()
    stats = FidStatistics(gaussian.mu, gaussian.sigma, count, features)
    if spatial_features:
        spatial = scorer.sums.gaussian("spatial")
        stats = replace(stats, mu_s=spatial.mu, sigma_s=spatial.sigma)
    if keep_features:
        stats = replace(stats, activations=scorer.sums.sums["kept"].cpu().numpy())
    save_stats(output, stats)
    return stats
