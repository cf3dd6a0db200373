"""Feature extractors by name: Inception, and the classifiers of the bundled models.

A feature extractor turns uint8 images into features and logits, as torch-fidelity's do.
"""

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch_fidelity import FeatureExtractorBase, register_feature_extractor
from torch_fidelity.utils import create_feature_extractor

from util.errors import UserError
from util.evaluation.conditions import Condition
from util.evaluation.feature_weights import PROMPTS, SHAPES, bundled_weights, inception_weights
from util.evaluation.sums import Judge
from util.tiny.captions import Scene, parse
from util.tiny.classifier import IMAGE_SIZE, ShapeClassifier
from util.tiny.prompt_classifier import PromptClassifier, compare, scenes_of

_SPATIAL_CHANNELS = 7  # ADM's evaluator: the first 7 channels of mixed_6/conv, 17 x 17 each


class ShapesFeatureExtractor(FeatureExtractorBase):
    """The classifier of the shapes data set as a feature extractor of torch-fidelity."""

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
    """Description of a feature extractor.

    find_weights: maps the user's path, or None, to the file that the extractor loads; UserError if it
    is missing. judge: compares logits with the images' conditions, which gives an accuracy.
    spatial_module: the module whose output (B, C, h, w) sFID uses, if there is one; spatial_dim: the
    size of its first channels, which are compared. check: raises UserError for a condition that judge
    cannot read.
    """

    feature_layer: str
    feature_dim: int
    logits_layer: str
    find_weights: Callable[[str | None], str]
    judge: Judge | None = None
    spatial_module: str | None = None
    spatial_dim: int | None = None
    check: Callable[[Condition], object] = lambda condition: None


FEATURES: dict[str, FeatureSpec] = {
    # 1008 outputs in the order of the 2015 TensorFlow graph, not in ImageNet's order; that graph's
    # mixed_6/conv is torchvision's Mixed_6d.branch1x1.
    "inception-v3-compat": FeatureSpec(
        "2048",
        2048,
        "logits_unbiased",
        inception_weights,
        spatial_module="Mixed_6d.branch1x1",
        spatial_dim=_SPATIAL_CHANNELS * 17 * 17,
    )
}


def register_features(name: str, spec: FeatureSpec, extractor: type[FeatureExtractorBase]) -> None:
    """Register an extractor by name, here and in torch-fidelity."""
    register_feature_extractor(name, extractor)
    FEATURES[name] = spec


def judge_labels(logits: torch.Tensor, conditions: Sequence[Condition]) -> list[dict[str, bool]]:
    """accuracy: the largest logit is the label."""
    found = logits.argmax(1).tolist()
    pairs = zip(found, conditions, strict=True)
    return [{"accuracy": a == b} if isinstance(b, int) else {} for a, b in pairs]


register_features(
    "shapes",
    FeatureSpec("64", 64, "logits", partial(bundled_weights, SHAPES), judge_labels),
    ShapesFeatureExtractor,
)


class PromptFeatureExtractor(ShapesFeatureExtractor):
    """The classifier of the captioned shapes as a feature extractor of torch-fidelity."""

    network = PromptClassifier


def _read_prompt(prompt: Condition) -> Scene:
    try:
        return parse(str(prompt))
    except ValueError as error:
        raise UserError(f"{error}; or choose other --features, or --no_score") from error


def _judge_prompts(logits: torch.Tensor, conditions: Sequence[Condition]) -> list[dict[str, bool]]:
    """accuracy: everything that a prompt states is right; agreement_X: its shape, colour, ..."""
    verdicts = []
    for found, prompt in zip(scenes_of(logits), conditions, strict=True):
        right = compare(_read_prompt(prompt), found)
        shares = {f"agreement_{name}": value for name, value in right.items()}
        verdicts.append({"accuracy": all(right.values()), **shares})
    return verdicts


register_features(
    "prompts",
    FeatureSpec(
        "64", 64, "logits", partial(bundled_weights, PROMPTS), _judge_prompts, check=_read_prompt
    ),
    PromptFeatureExtractor,
)


def feature_spec(features: str) -> FeatureSpec:
    """The registered extractor of that name. Raises UserError with the known names."""
    if features not in FEATURES:
        known = ", ".join(FEATURES)
        raise UserError(f"unknown feature extractor {features!r}; choose one of: {known}")
    return FEATURES[features]


class Extractor:
    """Images (B, 3, H, W) uint8 => {layer: (B, d) float32} on the device, "spatial" for sFID."""

    def __init__(
        self, features: str, path: str | None, device: str | torch.device, spatial: bool = False
    ) -> None:
        """UserError if the weights are missing or wrong, or there are no spatial features for sFID."""
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
                raise UserError(f"{features} has no spatial features: remove sfid from --metrics")
            network.get_submodule(self.spec.spatial_module).register_forward_hook(self._remember)

    def _remember(self, module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        # TensorFlow's order, as ADM's evaluator flattens it: (B, h, w, 7) => (B, h*w*7)
        self._spatial = output[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).float()

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = self._network(images.to(self.device))
        outputs = self._network.convert_features_tuple_to_dict(outputs)
        return outputs if self._spatial is None else {**outputs, "spatial": self._spatial}
