"""Pictures to score, and a toy extractor that stands in for Inception.

It has eight fixed projections of a 4x4 thumbnail, and nine channels of that thumbnail as spatial
features.
"""

import numpy as np
import torch
from torch_fidelity import FeatureExtractorBase

from tests.support.assertions import refusal
from util import metrics
from util.evaluation.extractors import judge_labels
from util.evaluation.image_source import Pictures, image_batches, open_source
from util.evaluation.request import ScoreRequest
from util.images import png_name, save_png


class ToyExtractor(FeatureExtractorBase):
    def __init__(self, name, features_list, **_):
        super().__init__(name, list(features_list))
        draws = torch.Generator().manual_seed(0)
        self.register_buffer("projection", torch.randn(48, 8, generator=draws))
        self.register_buffer("classes", torch.randn(8, 4, generator=draws))
        self.spatial = torch.nn.utils.skip_init(torch.nn.Conv2d, 3, 9, 1, bias=False)
        torch.nn.init.normal_(self.spatial.weight, generator=draws)

    @staticmethod
    def get_provided_features_list():
        return ("8", "logits")

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return {"fid": "8", "isc": "logits", "kid": "8", "prc": "8"}[metric]

    @staticmethod
    def can_be_compiled():
        return False

    def forward(self, input):
        thumbnail = torch.nn.functional.adaptive_avg_pool2d(input.float() / 255, 4)
        self.spatial(thumbnail)
        features = thumbnail.flatten(1) @ self.projection
        layers = {"8": features, "logits": features @ self.classes}
        return tuple(layers[name] for name in self.features_list)


metrics.register_features(
    "toy",
    metrics.FeatureSpec("8", 8, "logits", lambda path: path, judge_labels, "spatial"),
    ToyExtractor,
)


def pictures(count, seed=0, size=8):
    draws = np.random.default_rng(seed)
    light = draws.integers(1, 256, (count, 1, 1, 3))
    return (draws.random((count, size, size, 3)) * light).astype(np.uint8)


def write_pictures(path, images):
    path.mkdir()
    for index, image in enumerate(images):
        save_png(path / png_name(index), image)
    return path


def toy_stats(path, images):
    metrics.make_stats(Pictures(images), "toy", None, path, "cpu")
    return path


def toy_score(source, num_images, stats, **options):
    return metrics.score(source, num_images, request(stats), "cpu", **options)


def request(stats, *names, features="toy", path=None):
    return ScoreRequest(features, path, stats, names or ("fid", "isc"))


def refused(asked, num_images=None):
    """The sentence with which a request is refused before anything is generated."""
    return refusal(lambda: metrics.check_ready(asked, num_images))


def features_of(source, batch_size=64, name="toy", path=None):
    """{layer: (N, d)} of a folder or a Dataset."""
    extract = metrics.Extractor(name, path, "cpu")
    parts = [extract(images) for _, images in image_batches(open_source(source), batch_size)]
    return {layer: torch.cat([part[layer] for part in parts]) for layer in parts[0]}
