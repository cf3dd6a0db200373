"""The tokenizer of janus_tiny gives the same codes and images as transformers' class."""

import pytest
import torch

from util.errors import UserError
from util.tiny import janus_vq
from util.tiny.vq import load_tokenizer


def test_transformers_class_gives_the_same_codes_and_pictures_from_the_renamed_weights():
    pytest.importorskip("transformers")
    from util.tiny.janus import make_model

    torch.manual_seed(0)
    ours = janus_vq.janus_vq().eval()
    theirs = make_model().model.vqmodel.eval()
    theirs.load_state_dict(janus_vq.janus_weights(ours.state_dict()))
    images = janus_vq.draw(0, 2)
    with torch.no_grad():
        codes = ours.encode(images)
        assert len(codes.unique()) > 10
        assert torch.equal(theirs.encode(images).image_tokens.view_as(codes), codes)
        assert torch.allclose(theirs.decode(codes.flatten(1)), ours.decode(codes), atol=1e-4)


def test_pictures_are_floats_between_minus_one_and_one():
    images = janus_vq.draw(3, 2)
    assert images.shape == (2, 3, 64, 64) and images.dtype == torch.float32
    assert -1 <= images.min() < -0.5 and 0.5 < images.max() <= 1


def test_the_sheet_of_reconstructions_has_a_row_of_each_kind(tmp_path):
    from PIL import Image

    janus_vq.save_reconstructions(janus_vq.janus_vq().eval(), tmp_path / "sheet.png", 2, 3)
    assert Image.open(tmp_path / "sheet.png").size == (3 * 64, 4 * 64)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    from tests.support import ROOT

    with pytest.raises(UserError, match="of another model|check the model's flags"):
        path = ROOT / "pretrained_models/gpt_tiny/tokenizer.safetensors"
        load_tokenizer(path, janus_vq.janus_vq)
