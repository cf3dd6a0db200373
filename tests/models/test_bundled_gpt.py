"""The bundled GPT draws what its label says, with the full cache and with half of it."""

from pathlib import Path

import pytest
import torch
from models.presets import PRESETS

from models.gpt_images import GPTSampling, generate
from models.line_cache import LineARConfig
from models.llamagen import gpt_tiny
from models.vq import vq_tiny
from util.checkpoint import load_into
from util.images import to_uint8
from util.shapes import HELD_OUT_START, ShapesDataset
from util.tiny.classifier import ShapeClassifier

ROOT = Path(__file__).parents[2]
PRESET = PRESETS["gpt_tiny"]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = vq_tiny().eval()
    load_into(tokenizer, ROOT / PRESET.vae_path, use_ema=False)
    return tokenizer.requires_grad_(False)


def test_held_out_pictures_survive_the_tokenizer(tokenizer):
    data = ShapesDataset(HELD_OUT_START, 20)
    images = torch.stack([data[i][0] for i in range(20)]).float() / 127.5 - 1
    error = ((tokenizer.decode(tokenizer.encode(images)) - images) / 2).square().mean()
    assert -10 * error.log10() > 33  # dB


@pytest.mark.parametrize(
    "line_ar", [None, LineARConfig(1 / 2, recent=PRESET.line_recent)], ids=["full", "linear"]
)
def test_shapes_are_recognised(tokenizer, line_ar):
    model = gpt_tiny().eval()
    load_into(model, ROOT / PRESET.resume, use_ema=False)
    classifier = ShapeClassifier.from_file(ROOT / PRESET.features_path)
    labels = [i % 10 for i in range(20)]
    sampling = GPTSampling(PRESET.cfg, top_p=PRESET.top_p, line_ar=line_ar)
    images = to_uint8(generate(model, tokenizer, labels, range(20), sampling, PRESET.img_size))
    with torch.no_grad():
        _, logits = classifier(torch.from_numpy(images).permute(0, 3, 1, 2))
    assert (logits.argmax(dim=1) == torch.tensor(labels)).sum() >= 17
