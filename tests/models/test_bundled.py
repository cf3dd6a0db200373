"""The bundled model draws what its label says, with MAR and with LazyMAR, and its latents stay sane."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models.presets import PRESETS

from models import mar
from models.lazy_mar import LazyMARConfig
from models.linear_tokenizer import LinearTokenizer
from util.checkpoint import load_into
from util.images import to_uint8
from util.tiny.classifier import ShapeClassifier

ROOT = Path(__file__).parents[2]
PRESET = PRESETS["mar_tiny"]


@pytest.fixture(scope="module")
def model():
    model = mar.mar_tiny().eval()
    load_into(model, ROOT / PRESET.resume)
    return model


@pytest.mark.parametrize(
    "lazy_mar",
    [None, replace(LazyMARConfig(), head_interval=PRESET.head_interval)],
    ids=["mar", "lazymar"],
)
def test_shapes_are_recognised_and_latents_have_the_spread_of_real_ones(model, lazy_mar):
    tokenizer = LinearTokenizer.from_file(ROOT / PRESET.vae_path)
    classifier = ShapeClassifier.from_file(ROOT / PRESET.features_path)
    labels = torch.arange(20) % 10
    latents = model.sample_tokens(
        20, 16, PRESET.cfg, labels=labels, noise=model.image_noise(range(20)), lazy_mar=lazy_mar
    )
    assert 0.85 < latents.std() < 1.15
    assert latents.abs().max() < 8
    with torch.no_grad():
        images = to_uint8(tokenizer.decode(latents / tokenizer.latent_scale))
        _, logits = classifier(torch.from_numpy(images).permute(0, 3, 1, 2))
    assert (logits.argmax(dim=1) == labels).sum() >= 17
