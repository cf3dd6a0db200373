"""VQ-16: the published architecture and file; codes are the nearest directions."""

import pytest
import torch
import torch.nn.functional as F

from models.vq import VQModel, vq_tiny
from tests.support.golden_data import golden
from tests.support.golden_recipe import load_shapes, recipe_state_dict

SMALL = {"codebook_size": 32, "ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "z_channels": 16}


@pytest.fixture(scope="module")
def vq16() -> VQModel:
    vq = VQModel().eval().requires_grad_(False)
    shapes = load_shapes("VQ-16", "llamagen_state_dicts.json")
    vq.load_state_dict(recipe_state_dict(shapes, llamagen=True))
    return vq


@pytest.fixture
def small() -> VQModel:
    torch.manual_seed(0)
    return VQModel(**SMALL).eval().requires_grad_(False)


def test_names_shapes_and_their_order_are_those_of_the_published_file(vq16):
    ours = [(key, tuple(tensor.shape)) for key, tensor in vq16.state_dict().items()]
    assert ours == list(load_shapes("VQ-16", "llamagen_state_dicts.json").items())


def test_decoded_images_are_the_recorded_ones(vq16):
    data = golden("llamagen.npz")
    image = vq16.decode(data["vq_codes"].view(1, 4, 4))
    torch.testing.assert_close(image, data["vq_image"], rtol=1e-4, atol=1e-4)


def test_codes_of_an_image_are_the_recorded_ones(vq16):
    data = golden("llamagen.npz")
    codes = vq16.encode(data["vq_in"])
    assert codes.shape == (1, 4, 4)
    assert codes.dtype == torch.int64
    assert torch.equal(codes.flatten(), data["vq_encoded_codes"])


def test_a_code_is_the_nearest_on_the_unit_sphere_whatever_the_lengths(small):
    x = torch.rand(2, 3, 8, 12) * 2 - 1
    z = F.normalize(small.latents(x), dim=1)
    codes = small.encode(x)
    assert codes.shape == (2, 4, 6)
    vectors = F.normalize(small.quantize.embedding.weight, dim=1)
    distance = (z.movedim(1, -1)[..., None, :] - vectors).norm(dim=-1)
    assert torch.equal(codes, distance.argmin(-1))
    image = small.decode(codes)
    small.quantize.embedding.weight.mul_(torch.linspace(0.5, 3, 32)[:, None])
    assert torch.equal(small.encode(x), codes)
    torch.testing.assert_close(small.decode(codes), image)


def test_images_that_are_not_square_keep_their_shape(small):
    x = torch.rand(1, 3, 8, 20)
    assert small.stride == 2
    assert small.decode(small.encode(x)).shape == x.shape


def test_a_width_that_the_groups_do_not_divide_is_named():
    with pytest.raises(ValueError, match=r"ch=48 with ch_mult=\(1, 2\) gives 48"):
        VQModel(**{**SMALL, "ch": 48})
    assert VQModel(**{**SMALL, "ch": 48}, norm_groups=8).stride == 2


def test_the_bundled_tokenizer_has_sixteen_by_sixteen_codes():
    with torch.device("meta"):
        codes = vq_tiny().encode(torch.zeros(1, 3, 64, 64))
    assert codes.shape == (1, 16, 16)
