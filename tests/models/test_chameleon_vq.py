"""Chameleon's tokenizer: transformers has its encoder, which ours agrees with; the decoder is taming's."""

import pytest
import torch

from models.chameleon_vq import ChameleonVQ


def small() -> ChameleonVQ:
    torch.manual_seed(0)
    return ChameleonVQ(64, 32, ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=32).eval()


def test_the_official_geometry_has_these_keys():
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in ChameleonVQ().state_dict().items()}
    assert shapes["quantize.embedding.weight"] == (8192, 256)
    assert shapes["quant_conv.weight"] == shapes["post_quant_conv.weight"] == (256, 256, 1, 1)
    assert shapes["encoder.conv_out.weight"] == (256, 512, 3, 3)  # no moments
    assert shapes["decoder.conv_in.weight"] == (512, 256, 3, 3)
    assert shapes["decoder.up.4.block.2.norm1.weight"] == (512,)
    assert shapes["decoder.up.1.upsample.conv.weight"] == (128, 128, 3, 3)
    assert shapes["decoder.up.3.block.0.nin_shortcut.weight"] == (256, 512, 1, 1)
    attention = {k.rsplit(".attn", 1)[0] for k in shapes if ".attn" in k}
    assert attention == {"encoder.mid", "decoder.mid"}
    assert "decoder.up.0.upsample.conv.weight" not in shapes


def test_codes_are_those_of_the_encoder_of_transformers():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE

    ours = small().requires_grad_(False)
    ours.quantize.embedding.weight.normal_()
    config = transformers.models.chameleon.ChameleonVQVAEConfig(
        embed_dim=32, num_embeddings=64, latent_channels=32, base_channels=32,
        channel_multiplier=[1, 2], num_res_blocks=1, resolution=32,
    )  # fmt: skip
    theirs = ChameleonVQVAE(config).eval()
    _, more = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert all(key.startswith(("decoder.", "post_quant_conv.")) for key in more)
    images = torch.rand(2, 3, 32, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    codes = ours.encode(images)
    assert codes.shape == (2, 16, 12)
    assert len(codes.unique()) > 3
    assert torch.equal(codes.flatten(), theirs.encode(images).image_tokens.flatten())


def test_codes_are_decoded_as_they_are():
    """Unlike LlamaGen's they have a length; without it another picture would come out."""
    vq, codes = small().requires_grad_(False), torch.arange(12).view(1, 4, 3)
    picture = vq.decode(codes)
    assert picture.shape == (1, 3, 8, 6)
    latents = vq.quantize.embedding.weight[:12].T.reshape(1, 32, 4, 3)
    torch.testing.assert_close(picture, vq.decoder(vq.post_quant_conv(latents)))
    vq.quantize.embedding.weight.mul_(2)
    assert (vq.decode(codes) - picture).abs().max() > 1e-3
