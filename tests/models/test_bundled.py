"""The bundled models draw what their label says, with and without caches."""

import pytest
import torch

from engine import cli
from engine.llamagen import LlamaGenHost
from engine.mar import MARHost
from models.gpt_images import GPTGenerator
from tests.support import ROOT
from util.images import to_uint8
from util.shapes import HELD_OUT_START, pictures
from util.tiny.classifier import ShapeClassifier

CPU = torch.device("cpu")
LABELS = list(range(10))


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def recognised(images: torch.Tensor) -> int:
    """Of images (10, 3, 64, 64) in [-1, 1], how many the classifier takes for their label."""
    classifier = ShapeClassifier.from_file(cli.named("mar_tiny").request().features_path)
    _, logits = classifier(torch.from_numpy(to_uint8(images)).permute(0, 3, 1, 2))
    return int((logits.argmax(dim=1) == torch.tensor(LABELS)).sum())


@torch.no_grad()
@pytest.mark.parametrize("lazy_mar", [False, True], ids=["mar", "lazymar"])
def test_shapes_of_mar_are_recognised_and_latents_have_the_spread_of_real_ones(lazy_mar):
    host = cli.named("mar_tiny", lazy_mar=lazy_mar, num_iter=16).host()
    assert isinstance(host, MARHost)
    loaded = host.load(CPU)
    sampling, noise = vars(host.sampling), loaded.model.image_noise(LABELS)
    latents = loaded.model.sample_tokens(10, **sampling, labels=LABELS, noise=noise)
    assert 0.85 < latents.std() < 1.15
    assert latents.abs().max() < 8
    images = loaded.tokenizer.decode(latents / host.tokenizer.scale(loaded.tokenizer))
    assert recognised(images) >= 8


@torch.no_grad()
@pytest.mark.parametrize("line_ar", [False, True], ids=["full", "linear"])
def test_shapes_of_the_gpt_are_recognised(line_ar):
    budget = {"line_budget": 1 / 2} if line_ar else {}
    host = cli.named("gpt_tiny", line_ar=line_ar, **budget).host()
    assert isinstance(host, LlamaGenHost)
    loaded = host.load(CPU)
    size = host.images.img_size
    generator = GPTGenerator(loaded.model, loaded.tokenizer, host.sampling, size)
    images = generator.generate((LABELS, LABELS))
    assert recognised(images) >= 8


@torch.no_grad()
def test_held_out_pictures_survive_the_tokenizer_of_the_gpt():
    tokenizer = cli.named("gpt_tiny").host().open_tokenizer(CPU)
    images = pictures(HELD_OUT_START, 20).float() / 127.5 - 1
    error = ((tokenizer.decode(tokenizer.encode(images)) - images) / 2).square().mean()
    assert -10 * error.log10() > 33  # dB
