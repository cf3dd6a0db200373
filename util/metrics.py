"""Scores of generated images, by the published torch-fidelity or equal to it.

A feature extractor turns uint8 images into features and logits. FID (Heusel et al. 2017) is the
Frechet distance between the Gaussian of their features and that of reference images, Inception
Score (Salimans et al. 2016) is taken from the logits; on request sFID (Nash et al. 2021), KID
(Binkowski et al. 2018), precision and recall (Kynkaanniemi et al. 2019). Two numbers are comparable
only if extractor and reference are the same. This is the only module that imports torch-fidelity.

    python -m util.metrics make_stats --data_path DIR --output FILE.npz
"""

import argparse
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import Dataset
from torch_fidelity import FeatureExtractorBase, register_feature_extractor
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
from torch_fidelity.utils import create_feature_extractor
from tqdm import tqdm

from util.device import pick_device
from util.errors import UserError, run_main
from util.evaluation.conditions import Condition
from util.evaluation.feature_weights import inception_weights, prompts_weights, shapes_weights
from util.evaluation.image_source import (
    ImageSource,
    Pictures,
    image_batches,
    image_count,
    open_reference,
    open_source,
)
from util.evaluation.request import ScoreRequest
from util.evaluation.statistics import (
    FidStatistics,
    check_images,
    load_images,
    load_stats,
    save_stats,
)
from util.evaluation.sums import FeatureSums, Gaussian, Judge
from util.tiny.captions import parse
from util.tiny.classifier import IMAGE_SIZE, ShapeClassifier
from util.tiny.prompt_classifier import PromptClassifier, compare, scenes_of

KID_SUBSET = 1000  # images per subset, torch-fidelity's default; fewer where there are fewer
_SPATIAL_CHANNELS = 7  # ADM's evaluator: the first 7 channels of mixed_6/conv, 17 x 17 each


class ShapesFeatureExtractor(FeatureExtractorBase):
    """The small classifier of the bundled 64x64 shapes data, as torch-fidelity wants to see it."""

    network: type[ShapeClassifier] | type[PromptClassifier] = ShapeClassifier

    def __init__(
        self,
        name: str,
        features_list: Sequence[str],
        feature_extractor_weights_path: str | None = None,
        **_: object,
    ) -> None:
        super().__init__(name, list(features_list))
        assert feature_extractor_weights_path is not None
        self.classifier = self.network.from_file(feature_extractor_weights_path)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("64", "logits")

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return {"fid": "64", "kid": "64", "prc": "64", "isc": "logits"}[metric]

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(B, 3, 64, 64) uint8 => the requested ones of features (B, 64) and logits (B, 10)."""
        if input.shape[2:] != (IMAGE_SIZE, IMAGE_SIZE):
            raise UserError(
                f"the feature extractor shapes is for {IMAGE_SIZE}x{IMAGE_SIZE} images, got "
                f"{input.shape[2]}x{input.shape[3]}; choose another one"
            )
        features, logits = self.classifier(input)
        layers = {"64": features, "logits": logits}
        return tuple(layers[name] for name in self.features_list)


@dataclass(frozen=True)
class FeatureSpec:
    """What a feature extractor offers to the metrics.

    `find_weights` maps the user's path, or None, to the file that the extractor loads, or raises
    UserError that says how to get it.
    `judge`: says of logits and the images' conditions what is right, which gives an accuracy.
    `spatial_module`: the module whose output (B, C, h, w) sFID looks at, if there is one.
    """

    feature_layer: str
    feature_dim: int
    logits_layer: str
    find_weights: Callable[[str | None], str]
    judge: Judge | None = None
    spatial_module: str | None = None


_FEATURES: dict[str, FeatureSpec] = {
    # 1008 outputs in the order of the 2015 TensorFlow graph, not in ImageNet's order; that graph's
    # mixed_6/conv is torchvision's Mixed_6d.branch1x1.
    "inception-v3-compat": FeatureSpec(
        "2048",
        2048,
        "logits_unbiased",
        inception_weights,
        spatial_module="Mixed_6d.branch1x1",
    ),
}


def register_features(name: str, spec: FeatureSpec, extractor: type[FeatureExtractorBase]) -> None:
    """Make an extractor known by name, here and in torch-fidelity."""
    register_feature_extractor(name, extractor)
    _FEATURES[name] = spec


def _judge_labels(logits: torch.Tensor, conditions: Sequence[Condition]) -> list[dict[str, bool]]:
    """accuracy: the largest logit is the label."""
    found = logits.argmax(1).tolist()
    pairs = zip(found, conditions, strict=True)
    return [{"accuracy": a == b} if isinstance(b, int) else {} for a, b in pairs]


register_features(
    "shapes", FeatureSpec("64", 64, "logits", shapes_weights, _judge_labels), ShapesFeatureExtractor
)


class PromptFeatureExtractor(ShapesFeatureExtractor):
    """The classifier of the captioned shapes, as torch-fidelity wants to see it."""

    network = PromptClassifier


def _judge_prompts(logits: torch.Tensor, conditions: Sequence[Condition]) -> list[dict[str, bool]]:
    """accuracy: everything that a prompt states is right; agreement_X: its shape, colour, ..."""
    verdicts = []
    for found, prompt in zip(scenes_of(logits), conditions, strict=True):
        right = compare(parse(str(prompt)), found)
        shares = {f"agreement_{name}": value for name, value in right.items()}
        verdicts.append({"accuracy": all(right.values()), **shares})
    return verdicts


register_features(
    "prompts",
    FeatureSpec("64", 64, "logits", prompts_weights, _judge_prompts),
    PromptFeatureExtractor,
)


def feature_spec(features: str) -> FeatureSpec:
    """The registered extractor of that name. Raises UserError with the known names."""
    if features not in _FEATURES:
        known = ", ".join(_FEATURES)
        raise UserError(f"unknown feature extractor {features!r}; choose one of: {known}")
    return _FEATURES[features]


class Extractor:
    """Images (B, 3, H, W) uint8 => {layer: (B, d) float32} on the device, "spatial" for sFID."""

    def __init__(
        self, features: str, path: str | None, device: str | torch.device, spatial: bool = False
    ) -> None:
        """UserError if the weights are missing or wrong, or sFID is asked of one that has none."""
        self.spec, self.device = feature_spec(features), device
        try:
            network = create_feature_extractor(
                features,
                [self.spec.feature_layer, self.spec.logits_layer],
                cuda=False,
                feature_extractor_weights_path=self.spec.find_weights(path),
                verbose=False,
            )
        except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.PickleError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(
                f"the weights of feature extractor {features} cannot be loaded ({reason}); "
                f"replace the file {path or 'in the checkpoint folder of torch.hub'}"
            ) from error
        self._network = network.to(device)
        self._spatial: torch.Tensor | None = None
        if spatial:
            if self.spec.spatial_module is None:
                raise UserError(f"{features} has no spatial features: leave sfid out of --metrics")
            network.get_submodule(self.spec.spatial_module).register_forward_hook(self._remember)

    def _remember(self, module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        # TensorFlow's order, as ADM's evaluator flattens it: (B, h, w, 7) => (B, h*w*7)
        self._spatial = output[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).float()

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = self._network(images.to(self.device))
        outputs = self._network.convert_features_tuple_to_dict(outputs)
        return outputs if self._spatial is None else {**outputs, "spatial": self._spatial}


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
            for indices, images in image_batches(dataset, self.batch_size, part):
                self.update(indices, images)
                bar.update(len(indices))

    def result(self) -> dict[str, object]:
        """Those of util.evaluation.request.SCORES that were asked for, and the reference.

        Fewer images than IS_SPLITS would leave empty splits: IS is then taken over all images at once
        (is_splits 1, is_std 0). UserError unless all images are in.
        """
        request, sums = self.request, self.sums
        if sums.count() != sums.num_images:
            raise UserError(
                f"{sums.count()} of {sums.num_images} images are scored; start it again"
            )
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

    def _compare_features(
        self, ours: torch.Tensor, reference: FidStatistics
    ) -> dict[str, float | int]:
        """KID and precision / recall of features (N, d), by torch-fidelity."""
        if reference.activations is not None:
            theirs = torch.from_numpy(reference.activations)
        else:
            images = Pictures(load_images(self.request.stats_path))
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
        raise UserError("precision and recall need more than 3 images on either side")


def _frechet(ours: Gaussian, theirs: Gaussian) -> float:
    first, second = (
        {"mu": g.mu.astype("float64"), "sigma": g.sigma.astype("float64")} for g in (ours, theirs)
    )
    return fid_statistics_to_metric(first, second, verbose=False)[KEY_METRIC_FID]


def _features_of(dataset: Dataset, extractor: Extractor, batch_size: int) -> torch.Tensor:
    """(N, d) float32 on the CPU."""
    batches = image_batches(dataset, batch_size)
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
    if "sfid" in request.metrics and stats.mu_s is None:
        raise UserError(
            f"{path} has no mu_s and sigma_s, which sfid needs: make them by make_stats"
        )
    if request.needs_features and stats.activations is None and not stats.has_images:
        raise UserError(
            f"{path} has neither features nor images (arr_0), which kid and pr need: take that of "
            "`python -m util.download adm_batch`, or make_stats --keep_features"
        )
    return stats


def check_ready(request: ScoreRequest, num_images: int | None = None) -> None:
    """Raise UserError if scoring `num_images` cannot work; call it before anything is generated.

    All that scoring will read is read here once: damage is found before hours of sampling.
    """
    reference = _load_stats_for(request)
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
    source: ImageSource,
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
    dataset = open_source(source, num_images)
    _load_stats_for(request)
    scorer = Scorer(request, num_images, device, labels, batch_size)
    scorer.add(dataset, range(num_images))
    return scorer.result()


def make_stats(
    source: ImageSource,
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
        source = open_reference(source, img_size)
    count = image_count(source)
    if count < 2:
        raise UserError(f"FID statistics need at least 2 images, got {count}; check the folder")
    spatial_features = feature_spec(features).spatial_module is not None
    wanted = {"fid": True, "sfid": spatial_features, "kid": keep_features}
    metrics = tuple(name for name, is_wanted in wanted.items() if is_wanted)
    scorer = Scorer(
        ScoreRequest(features, features_path, output, metrics), count, device, None, batch_size
    )
    scorer.add(source, range(count))
    gaussian, spatial, kept = scorer.sums.gaussian(), None, None
    if "sfid" in metrics:
        spatial = scorer.sums.gaussian("spatial")
    if keep_features:
        kept = scorer.sums.sums["kept"].cpu().numpy()
    stats = FidStatistics(
        gaussian.mu,
        gaussian.sigma,
        count,
        features,
        None if spatial is None else spatial.mu,
        None if spatial is None else spatial.sigma,
        kept,
    )
    save_stats(output, stats)
    return stats


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m util.metrics", description=__doc__)
    command = parser.add_subparsers(dest="command", required=True).add_parser(
        "make_stats", help="reference statistics of a folder of images, for FID"
    )
    add = command.add_argument
    add("--data_path", required=True, help="folder of images or of class folders")
    add("--features", default="inception-v3-compat", help=f"one of: {', '.join(_FEATURES)}")
    add("--features_path", help="weights of the extractor")
    add("--output", help="npz file to write; without it the folder's name and .npz, here")
    add("--img_size", type=int, help="crop to this size as for training")
    add("--keep_features", action="store_true", help="keep all features too, for kid and pr")
    add("--device", help="default: cuda where there is one, else cpu")
    add("--batch_size", type=int, default=64)
    args = parser.parse_args()
    output = Path(args.output or f"{Path(args.data_path).absolute().name}.npz")
    if args.output is None and output.exists():
        raise UserError(f"{output} exists: say --output FILE.npz")
    stats = make_stats(
        args.data_path,
        args.features,
        args.features_path,
        output,
        pick_device(args.device),
        args.batch_size,
        args.img_size,
        args.keep_features,
    )
    print(f"{output}: {stats.features}, {stats.num_images} images, {stats.mu.size} features")


if __name__ == "__main__":
    run_main(main)
