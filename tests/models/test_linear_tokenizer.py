"""The linear tokenizer: the interface of an autoencoder, as good as stated, safe to load."""

import math
from pathlib import Path

import pytest
import torch

from models.linear_tokenizer import LinearTokenizer
from util.shapes import HELD_OUT_START, pictures
from util.tiny.training import save_weights

BUNDLED = Path(__file__).parents[2] / "pretrained_models" / "mar_tiny" / "tokenizer.safetensors"


def shapes(start: int, length: int) -> torch.Tensor:
    return pictures(start, length).float() / 127.5 - 1


def psnr(restored: torch.Tensor, images: torch.Tensor) -> float:
    return -10 * math.log10((restored - images).square().mean().item() / 4)


@pytest.fixture(scope="module")
def images():
    return shapes(0, 100)


@pytest.fixture(scope="module")
def bundled():
    return LinearTokenizer.from_file(BUNDLED)


def metadata_of(tokenizer: LinearTokenizer) -> dict[str, object]:
    return {name: getattr(tokenizer, name) for name in ("channels", "stride", "latent_scale")}


def test_the_bundled_tokenizer_restores_unseen_pictures_above_33_decibels(bundled):
    unseen = shapes(HELD_OUT_START, 100)
    assert psnr(bundled.decode(bundled.encode(unseen).mode()), unseen) > 33


def test_bundled_latents_times_latent_scale_have_unit_variance_and_stay_within_6(bundled):
    latents = bundled.encode(shapes(HELD_OUT_START, 200)).mode() * bundled.latent_scale
    assert latents.std().item() == pytest.approx(1, abs=0.03)
    assert latents.mean().abs() < 0.03
    assert latents.abs().max() < 6


def test_an_error_in_the_latents_is_not_amplified_by_decoding(bundled, images):
    latents = bundled.encode(images[:20]).mode()
    error = 0.1 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    change = bundled.decode(latents + error) - bundled.decode(latents)
    assert change.std() < error.std()


def test_draws_spread_by_their_deviation_and_the_mode_stays(bundled, images):
    posterior = bundled.encode(images[:20])
    assert posterior.parameters.shape == (20, 16, 16, 16)
    draw = posterior.sample(generator=torch.Generator().manual_seed(0))
    error = (draw - posterior.mode()) * bundled.latent_scale
    assert error.std().item() == pytest.approx(0.07, rel=0.02)
    noise = psnr(bundled.decode(draw), bundled.decode(posterior.mode()))
    assert noise == pytest.approx(39, abs=1)


def test_more_channels_restore_more(images):
    quality = [
        psnr(tokenizer.decode(tokenizer.encode(images).mode()), images)
        for tokenizer in (LinearTokenizer.fit(images, channels) for channels in (3, 8, 16))
    ]
    assert quality[0] + 3 < quality[1] and quality[1] + 3 < quality[2]


def test_channels_are_uncorrelated_and_whitened_by_half(images):
    tokenizer = LinearTokenizer.fit(images, channels=5)
    latents = tokenizer.encode(images).mode().transpose(0, 1).flatten(1)
    components = tokenizer.encoder.weight.flatten(1)
    deviation = latents.var(1)  # after division by sqrt(std) the variance is the deviation before
    assert torch.allclose(components.square().sum(1) * deviation, torch.ones(5), rtol=1e-3)
    assert (torch.corrcoef(latents) - torch.eye(5)).abs().max() < 1e-3


def test_a_flat_picture_comes_back_flat(bundled):
    colour = torch.tensor([206, 38, 62]).view(1, 3, 1, 1) / 127.5 - 1
    flat = colour.expand(1, 3, 64, 64)
    assert (bundled.decode(bundled.encode(flat).mode()) - flat).abs().max() < 0.06


@pytest.mark.parametrize("size", [(64, 64), (8, 32), (256, 256)])
def test_any_size_divisible_by_the_stride_is_encoded(bundled, size):
    latents = bundled.encode(torch.zeros(1, 3, *size)).mode()
    assert latents.shape == (1, 8, size[0] // 4, size[1] // 4)
    assert bundled.decode(latents).shape == (1, 3, *size)


def test_a_size_that_the_stride_does_not_divide_is_refused(bundled):
    with pytest.raises(ValueError, match="multiples of 4"):
        bundled.encode(torch.zeros(1, 3, 64, 66))


def test_the_fit_is_the_same_whatever_the_chunks(images, monkeypatch):
    whole = LinearTokenizer.fit(images)
    monkeypatch.setattr("models.linear_tokenizer.FIT_CHUNK", 7)
    chunked = LinearTokenizer.fit(images)
    assert torch.allclose(whole.encode(images).mode(), chunked.encode(images).mode(), atol=1e-4)
    assert whole.latent_scale == pytest.approx(chunked.latent_scale)


def test_images_without_variety_cannot_be_fitted():
    with pytest.raises(ValueError, match="fewer than 8 directions"):
        LinearTokenizer.fit(torch.zeros(4, 3, 16, 16))


@pytest.mark.parametrize("channels", [0, 49])
def test_an_impossible_number_of_channels_is_refused(channels):
    with pytest.raises(ValueError, match=r"1\.\.48"):
        LinearTokenizer(channels=channels)


def test_a_saved_tokenizer_comes_back_the_same(tmp_path, images):
    tokenizer = LinearTokenizer.fit(images, channels=4, stride=8)
    save_weights(tmp_path / "t.safetensors", tokenizer.state_dict(), metadata_of(tokenizer))
    again = LinearTokenizer.from_file(tmp_path / "t.safetensors")
    assert torch.equal(again.encode(images).mode(), tokenizer.encode(images).mode())
    assert again.latent_scale == tokenizer.latent_scale


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.safetensors"):
        LinearTokenizer.from_file(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("length", [0, 5, 1000])
def test_a_truncated_file_is_refused_in_one_line(tmp_path, length):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(BUNDLED.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"damaged|is empty") as caught:
        LinearTokenizer.from_file(path)
    assert "\n" not in str(caught.value)


def test_the_file_of_another_model_is_refused_in_one_line():
    with pytest.raises(ValueError, match="not a linear tokenizer") as caught:
        LinearTokenizer.from_file(BUNDLED.with_name("classifier.safetensors"))
    assert "\n" not in str(caught.value)


def test_weights_that_contradict_the_metadata_are_refused(tmp_path, bundled):
    save_weights(
        tmp_path / "t.safetensors", bundled.state_dict(), metadata_of(bundled) | {"channels": 4}
    )
    with pytest.raises(ValueError, match="not a linear tokenizer"):
        LinearTokenizer.from_file(tmp_path / "t.safetensors")
