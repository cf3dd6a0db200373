"""A small MAR, its samples, and the caches under test."""

import torch

from models.lazy_mar import LazyMARConfig
from models.mar import MAR
from models.noise import ImageNoise

CLOSE = 1e-5  # kernels round differently for other batch sizes; head noise is of size 1
CONFIGS = {
    "all": LazyMARConfig(warmup=2, interval=4),
    "token": LazyMARConfig(warmup=2, interval=4, condition_cache=False, head_cache=False),
    "condition": LazyMARConfig(warmup=2, interval=4, token_cache=False, head_cache=False),
    "head": LazyMARConfig(warmup=2, interval=4, token_cache=False, condition_cache=False),
}


GEOMETRIES = {
    "plain": {},
    "no buffer": {"buffer_size": 0},
    "patches": {"patch_size": 2},
    "shallow decoder": {"decoder_depth": 2},
    "probe last": {"decoder_depth": 4},
    "deep decoder": {"encoder_depth": 1, "decoder_depth": 6},
    "unequal widths": {"encoder_embed_dim": 48, "encoder_num_heads": 3},
    "shallow head": {"diffloss_d": 1},
    "one token": {"img_size": 4},
}


def small_mar(**kwargs) -> MAR:
    """64 tokens of 4 channels with weights that make every path matter."""
    torch.manual_seed(0)
    config = {
        "img_size": 32, "vae_stride": 4, "vae_embed_dim": 4, "class_num": 5, "buffer_size": 6,
        "encoder_embed_dim": 32, "encoder_depth": 3, "encoder_num_heads": 4,
        "decoder_embed_dim": 32, "decoder_depth": 5, "decoder_num_heads": 4,
        "diffloss_d": 6, "diffloss_w": 32, "num_sampling_steps": "ddim25",
    }  # fmt: skip
    model = MAR(**{**config, **kwargs}).eval()
    for parameter in model.parameters():  # adaLN and output layers start at zero
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


def noise_of(model: MAR, seeds) -> ImageNoise:
    return model.image_noise(list(seeds))


def sample(model, seeds=(3, 4), labels=(1, 2), num_iter=12, cfg=3.0, **kwargs):
    return model.sample_tokens(
        len(seeds), num_iter, cfg, labels=labels, noise=noise_of(model, seeds), **kwargs
    )
