"""FID and Inception Score of generated images, by the functions of the published torch-fidelity.

A feature extractor turns uint8 images into features (FID: Frechet distance between two Gaussians,
Heusel et al. 2017) and logits (IS: Salimans et al. 2016). FID compares with statistics made once
from reference images; two FIDs are comparable only if extractor and statistics are the same.
This is the only module that imports torch-fidelity.

    python -m util.metrics make_stats --data_path DIR --features NAME --output FILE.npz
"""

import argparse
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import torch
from torch.utils.data import Dataset
from torch_fidelity import FeatureExtractorBase, register_feature_extractor
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.metric_fid import (
    KEY_METRIC_FID,
    fid_featuresdict_to_statistics,
    fid_statistics_to_metric,
)
from torch_fidelity.metric_isc import (
    KEY_METRIC_ISC_MEAN,
    KEY_METRIC_ISC_STD,
    isc_featuresdict_to_metric,
)
from torch_fidelity.utils import create_feature_extractor
from tqdm import tqdm

from util.checkpoint import read_pickle
from util.device import pick_device
from util.errors import UserError, run_main
from util.fid_stats import FidStatistics, load_stats, save_stats
from util.image_source import ImageFiles, ImageSource, image_batches, open_source
from util.images import list_images
from util.shape_classifier import IMAGE_SIZE, ShapeClassifier

IS_SPLITS = 10  # Salimans et al. 2016; MAR's evaluation
IS_SEED = 2020  # torch-fidelity's default seed of the shuffle before splitting
_INCEPTION_HASH = "6726825d"  # first digits of the sha256, stated by the file's name


class ShapesFeatureExtractor(FeatureExtractorBase):
    """The small classifier of the bundled 64x64 shapes data, as torch-fidelity wants to see it."""

    def __init__(
        self,
        name: str,
        features_list: Sequence[str],
        feature_extractor_weights_path: str | None = None,
        **_: object,
    ) -> None:
        super().__init__(name, list(features_list))
        self.classifier = ShapeClassifier.from_file(feature_extractor_weights_path)

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


def _inception_weights(path: str | None) -> str:
    """The given file, else torch.hub's copy, downloaded if missing; never a pickle that runs code.

    torch-fidelity unpickles the file as it is, so it is read here first with weights_only.
    """
    if path is None:
        path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(URL_INCEPTION_V3))
        if not os.path.exists(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            try:
                torch.hub.download_url_to_file(URL_INCEPTION_V3, path, _INCEPTION_HASH)
            except (URLError, TimeoutError, ConnectionError) as error:
                raise UserError(
                    f"Inception's weights {path} are missing and cannot be downloaded ({error}); "
                    "run `python -m util.download inception` where there is a network"
                ) from error
    elif not os.path.isfile(path):
        raise UserError(
            f"Inception's weights {path} are missing; `python -m util.download inception` gets them"
        )
    read_pickle(Path(path))
    return path


def _shapes_weights(path: str | None) -> str:
    if path is None or not os.path.isfile(path):
        raise UserError(
            f"the shapes classifier {path or ''} is missing; the repository has it as "
            "pretrained_models/mar_tiny/classifier.safetensors"
        )
    return path


@dataclass(frozen=True)
class FeatureSpec:
    """What a feature extractor offers to FID and IS.

    `find_weights` maps the user's path, or None, to the file that the extractor loads, or raises
    UserError that says how to get it.
    `knows_labels`: its logits are over the labels of the data set, so they give an accuracy.
    """

    feature_layer: str
    feature_dim: int
    logits_layer: str
    knows_labels: bool
    find_weights: Callable[[str | None], str]


_FEATURES: dict[str, FeatureSpec] = {
    # 1008 outputs in the order of the 2015 TensorFlow graph, not in ImageNet's order.
    "inception-v3-compat": FeatureSpec("2048", 2048, "logits_unbiased", False, _inception_weights),
}


def register_features(name: str, spec: FeatureSpec, extractor: type[FeatureExtractorBase]) -> None:
    """Make an extractor known by name, here and in torch-fidelity."""
    register_feature_extractor(name, extractor)
    _FEATURES[name] = spec


register_features(
    "shapes", FeatureSpec("64", 64, "logits", True, _shapes_weights), ShapesFeatureExtractor
)


def feature_spec(features: str) -> FeatureSpec:
    """The registered extractor of that name. Raises UserError with the known names."""
    if features not in _FEATURES:
        known = ", ".join(_FEATURES)
        raise UserError(f"unknown feature extractor {features!r}; choose one of: {known}")
    return _FEATURES[features]


def _load_stats_for(features: str, path: str | os.PathLike) -> FidStatistics:
    spec, stats = feature_spec(features), load_stats(path)
    if stats.features not in (None, features) or stats.mu.size != spec.feature_dim:
        raise UserError(
            f"{path} holds {stats.mu.size}-d statistics of {stats.features or 'an extractor'}, "
            f"but {features} has {spec.feature_dim} features; "
            "give the statistics made with the same extractor"
        )
    return stats


def _create_extractor(features: str, features_path: str | None) -> FeatureExtractorBase:
    spec = feature_spec(features)
    try:
        return create_feature_extractor(
            features,
            [spec.feature_layer, spec.logits_layer],
            cuda=False,
            feature_extractor_weights_path=spec.find_weights(features_path),
            verbose=False,
        )
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the weights of feature extractor {features} cannot be loaded ({reason}); "
            f"replace the file {features_path or 'in the checkpoint folder of torch.hub'}"
        ) from error


def check_ready(features: str, features_path: str | None, stats_path: str | os.PathLike) -> None:
    """Raise UserError if `score` cannot run; to be called before anything is generated."""
    _load_stats_for(features, stats_path)
    _create_extractor(features, features_path)


def extract_features(
    source: ImageSource,
    features: str,
    features_path: str | None,
    device: str | torch.device,
    batch_size: int = 64,
) -> dict[str, torch.Tensor]:
    """Features and logits of all images: {layer: (N, d) float32 on the CPU}.

    `source` is a folder of PNG or JPEG files, taken in the order of their names, or a Dataset of
    (3, H, W) uint8 tensors or (tensor, label) pairs. Raises UserError for an unreadable image or
    missing weights.
    """
    dataset = open_source(source)
    if len(dataset) == 0:
        raise UserError("there are no PNG or JPEG images to extract features of; check the folder")
    extractor = _create_extractor(features, features_path).to(device)
    parts: dict[str, list[torch.Tensor]] = {}
    with (
        torch.no_grad(),
        tqdm(total=len(dataset), desc="features", leave=False, disable=None) as bar,
    ):
        for images in image_batches(dataset, batch_size):  # (B, 3, H, W) uint8
            outputs = extractor.convert_features_tuple_to_dict(extractor(images.to(device)))
            for layer, values in outputs.items():
                parts.setdefault(layer, []).append(values.cpu())
            bar.update(len(images))
    return {layer: torch.cat(values) for layer, values in parts.items()}


def score_features(
    extracted: dict[str, torch.Tensor], features: str, stats_path: str | os.PathLike
) -> dict[str, float | int]:
    """FID and IS of extracted features: fid, is_mean, is_std, is_splits.

    Bitwise torch-fidelity's numbers. Fewer images than IS_SPLITS would leave empty splits: IS is
    then taken over all images at once (is_splits 1, is_std 0). Raises UserError below two images,
    which have no covariance.
    """
    spec, reference = feature_spec(features), _load_stats_for(features, stats_path)
    count = len(extracted[spec.feature_layer])
    if count < 2:
        raise UserError(f"FID needs at least 2 images, got {count}; generate more")
    ours = fid_featuresdict_to_statistics(extracted, spec.feature_layer)
    # torch-fidelity asserts equal dtypes: mu is float32 like the features, sigma is float64.
    theirs = {
        "mu": reference.mu.astype(ours["mu"].dtype),
        "sigma": reference.sigma.astype(ours["sigma"].dtype),
    }
    splits = IS_SPLITS if count >= IS_SPLITS else 1
    isc = isc_featuresdict_to_metric(
        extracted,
        spec.logits_layer,
        isc_splits=splits,
        samples_shuffle=True,
        rng_seed=IS_SEED,
        verbose=False,
    )
    return {
        "fid": fid_statistics_to_metric(ours, theirs, verbose=False)[KEY_METRIC_FID],
        "is_mean": isc[KEY_METRIC_ISC_MEAN],
        "is_std": isc[KEY_METRIC_ISC_STD],
        "is_splits": splits,
    }


def accuracy(logits: torch.Tensor, labels: torch.Tensor | Sequence[int]) -> float:
    """Share of images whose largest logit is their label; (N, classes), (N,) => [0, 1]."""
    labels = torch.as_tensor(labels, device=logits.device)
    if labels.shape != logits.shape[:1]:
        raise ValueError(f"labels {tuple(labels.shape)} for logits {tuple(logits.shape)}")
    return (logits.argmax(dim=1) == labels).double().mean().item()


def score(
    source: ImageSource,
    num_images: int,
    features: str,
    features_path: str | None,
    stats_path: str | os.PathLike,
    device: str | torch.device,
    batch_size: int = 64,
    labels: torch.Tensor | Sequence[int] | None = None,
) -> dict[str, float | int]:
    """Count, extract and score `num_images` generated images: fid, is_mean, is_std, is_splits.

    `source` is a folder of numbered PNGs, image i in the i-th place, or a Dataset. With `labels`
    (N,) and an extractor that knows them the result has `accuracy` too.
    """
    dataset = open_source(source, num_images)
    _load_stats_for(features, stats_path)
    extracted = extract_features(dataset, features, features_path, device, batch_size)
    result = score_features(extracted, features, stats_path)
    spec = feature_spec(features)
    if labels is not None and spec.knows_labels:
        result["accuracy"] = accuracy(extracted[spec.logits_layer], labels)
    return result


def make_stats(
    source: ImageSource,
    features: str,
    features_path: str | None,
    output: str | os.PathLike,
    device: str | torch.device,
    batch_size: int = 64,
    img_size: int | None = None,
) -> FidStatistics:
    """Write the reference statistics of images as an npz: mu, sigma, num_images, features.

    `source` is a Dataset or a folder with images, in class folders or not; with `img_size` the
    files are resized and cropped as for training. Raises UserError, and then writes nothing.
    """
    if not Path(output).absolute().parent.is_dir():
        raise UserError(f"the folder of {output} does not exist; create it or change --output")
    if not isinstance(source, Dataset):
        source = ImageFiles(list_images(source, recursive=True), img_size)
    extracted = extract_features(source, features, features_path, device, batch_size)
    layer = feature_spec(features).feature_layer
    count = len(extracted[layer])
    if count < 2:
        raise UserError(f"FID statistics need at least 2 images, got {count}")
    arrays = fid_featuresdict_to_statistics(extracted, layer)
    stats = FidStatistics(arrays["mu"], arrays["sigma"], count, features)
    save_stats(output, stats)
    return stats


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m util.metrics", description=__doc__)
    command = parser.add_subparsers(dest="command", required=True).add_parser(
        "make_stats", help="reference statistics of a folder of images, for FID"
    )
    command.add_argument("--data_path", required=True, help="folder of images or of class folders")
    command.add_argument("--features", required=True, help=f"one of: {', '.join(_FEATURES)}")
    command.add_argument("--features_path", help="weights of the extractor")
    command.add_argument("--output", required=True, help="npz file to write")
    command.add_argument("--img_size", type=int, help="crop to this size as for training")
    command.add_argument("--device", help="default: cuda where there is one, else cpu")
    command.add_argument("--batch_size", type=int, default=64)
    args = parser.parse_args()
    stats = make_stats(
        args.data_path,
        args.features,
        args.features_path,
        args.output,
        pick_device(args.device),
        args.batch_size,
        args.img_size,
    )
    print(f"{args.output}: {stats.features}, {stats.num_images} images, {stats.mu.size} features")


if __name__ == "__main__":
    run_main(main)
