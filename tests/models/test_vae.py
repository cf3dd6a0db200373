"""KL-16: the published architecture, its file, and the Gaussian that the encoder returns."""

import argparse

import numpy as np
import pytest
import torch
from torch import distributions

from models.vae import AutoencoderKL, DiagonalGaussianDistribution
from tests.support.golden_data import golden, relative_error
from tests.support.golden_recipe import load_shapes, recipe_state_dict

SMALL = {"embed_dim": 4, "ch_mult": (1, 2), "ch": 32, "num_res_blocks": 1}


@pytest.fixture(scope="module")
def kl16() -> AutoencoderKL:
    vae = AutoencoderKL(embed_dim=16, ch_mult=(1, 1, 2, 2, 4)).eval().requires_grad_(False)
    vae.load_state_dict(recipe_state_dict(load_shapes("vae_kl16")))
    return vae


@pytest.fixture
def small() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(**SMALL).eval().requires_grad_(False)


def test_names_shapes_and_their_order_are_those_of_the_published_file(kl16):
    ours = [(key, tuple(tensor.shape)) for key, tensor in kl16.state_dict().items()]
    assert ours == list(load_shapes("vae_kl16").items())
    assert len(ours) == 312


def test_encoding_and_decoding_match_the_published_implementation(kl16):
    data = golden("vae_kl16.npz")
    posterior = kl16.encode(data["image"])
    assert relative_error(posterior.parameters, data["moments"]) < 1e-5
    assert relative_error(posterior.mean, data["mean"]) < 1e-5
    assert relative_error(posterior.std, data["std"]) < 1e-5
    assert relative_error(kl16.decode(data["latent"]), data["decoded"]) < 1e-5


def test_forward_is_encoding_then_decoding(small):
    x = torch.rand(2, 3, 8, 16) * 2 - 1
    image, posterior = small(x, sample_posterior=False)
    assert image.shape == x.shape
    assert posterior.mean.shape == (2, 4, 4, 8)
    assert torch.equal(image, small.decode(small.encode(x).mode()))
    assert not torch.equal(small(x)[0], image)


def test_an_image_encodes_the_same_alone_and_in_a_batch(small):
    x = torch.rand(3, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(small.encode(x).mean[1:2], small.encode(x[1:2]).mean)


def test_the_latent_width_may_differ_from_the_width_inside():
    vae = AutoencoderKL(**SMALL, z_channels=6)
    assert vae.quant_conv.weight.shape[:2] == (8, 12)
    assert vae.decode(vae.encode(torch.zeros(1, 3, 8, 8)).mode()).shape == (1, 3, 8, 8)


def test_without_the_variational_part_a_sample_is_the_mode():
    posterior = AutoencoderKL(**SMALL, use_variational=False).encode(torch.rand(1, 3, 8, 8))
    assert posterior.mean.shape == (1, 4, 4, 4)
    torch.testing.assert_close(posterior.sample(), posterior.mode(), rtol=0, atol=1e-5)


def test_the_log_variance_is_clamped_and_the_mean_is_not():
    values = torch.tensor([-1000.0, 0.0, 1000.0]).view(1, 1, 1, 3)
    gaussian = DiagonalGaussianDistribution(torch.cat([values, values], dim=1))
    assert gaussian.logvar.flatten().tolist() == [-30, 0, 20]
    assert torch.equal(gaussian.mode(), values)
    torch.testing.assert_close(gaussian.std.square(), gaussian.var)


def test_the_divergence_is_that_of_torch_distributions():
    gaussian = DiagonalGaussianDistribution(torch.randn(3, 8, 2, 2))
    normal = distributions.Normal(gaussian.mean, gaussian.std)
    expected = distributions.kl_divergence(normal, distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(gaussian.kl(), expected.sum(dim=(1, 2, 3)))


def test_samples_have_the_mean_and_the_deviation_that_the_parameters_say():
    mean, logvar = torch.full((1, 1, 200, 200), 3.0), torch.full((1, 1, 200, 200), -2.0)
    gaussian = DiagonalGaussianDistribution(torch.cat([mean, logvar], dim=1))
    sample = gaussian.sample(torch.Generator().manual_seed(0))
    assert sample.mean().item() == pytest.approx(3.0, abs=0.01)
    assert sample.std().item() == pytest.approx(np.exp(-1.0), rel=0.02)


def test_the_generator_alone_decides_the_sample():
    gaussian = DiagonalGaussianDistribution(torch.randn(1, 8, 2, 2))
    draws = [gaussian.sample(torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_a_width_that_32_groups_do_not_divide_is_named():
    with pytest.raises(ValueError, match=r"ch=48 with ch_mult=\(2, 3\) gives 48"):
        AutoencoderKL(embed_dim=4, ch_mult=(2, 3), ch=48)


def test_the_weights_come_from_the_model_entry_of_the_file(small, tmp_path):
    path = tmp_path / "kl.ckpt"
    torch.save({"model": small.state_dict(), "args": argparse.Namespace(lr=1e-4)}, path)
    loaded = AutoencoderKL(**SMALL, ckpt_path=path).state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in small.state_dict().items())


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt not found: .*util\.download vae"):
        AutoencoderKL(**SMALL, ckpt_path=tmp_path / "none.ckpt")
