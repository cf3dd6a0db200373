"""ImageNoise: seed s names one image, everywhere."""

import hashlib

import numpy as np
import pytest
import torch

from models.noise import ImageNoise

FROZEN_ORDER = [29, 8, 15, 13, 28, 52, 61, 56]
FROZEN_DIGEST = "5e72b287747830fc"


def test_image_i_depends_on_its_own_seed_alone():
    one = ImageNoise.from_seeds([7], 16, 5, 3)
    many = ImageNoise.from_seeds([1, 7, 7, 9], 16, 5, 3)
    for i in (1, 2):
        assert torch.equal(many.orders[i], one.orders[0])
        assert torch.equal(many.head[i], one.head[0])
    assert not torch.equal(many.head[0], many.head[3])


def test_shapes_and_types_are_those_of_the_interface():
    noise = ImageNoise.from_seeds([0, 2**40], 16, 5, 3, "cpu")
    assert noise.orders.shape == (2, 16)
    assert noise.orders.dtype == torch.int64
    assert noise.head.shape == (2, 16, 6, 3)
    assert noise.head.dtype == torch.float32
    assert (noise.orders.sort(dim=1).values == torch.arange(16)).all()


def test_the_stream_is_frozen():
    """A change here changes every image that anyone has named by its seed."""
    noise = ImageNoise.from_seeds([2026], 64, 4, 4)
    assert noise.orders[0, :8].tolist() == FROZEN_ORDER
    digest = hashlib.sha256(np.round(noise.head.numpy(), 3).tobytes()).hexdigest()[:16]
    assert digest == FROZEN_DIGEST


def test_head_noise_is_standard_normal():
    head = ImageNoise.from_seeds(range(8), 64, 20, 4).head
    assert abs(head.mean().item()) < 0.02
    assert abs(head.std().item() - 1) < 0.02


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="-1"):
        ImageNoise.from_seeds([-1], 4, 2, 2)
