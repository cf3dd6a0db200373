"""l-DeTok: its tokenizer and its MAR equal the recorded runs of the published implementation."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from models import mar
from models.denoiser import guide
from models.detok import BASE, DeTok
from models.lazy_mar import CACHES, LazyMARConfig
from tests.support.golden_data import relative_error
from tests.support.golden_detok import detok_mar, detok_noise, recorded, tokenizer
from tests.support.golden_recipe import load_shapes

SHAPES = "detok_state_dicts.json"
EXACT, SAMPLED = 1e-5, 1e-4
SAMPLE_KEY = re.compile(
    r"sample/(steps100_)?T(\d+)_cfg(\d+)(_constant)?(?:_temp([\d.]+))?(_nolabels)?$"
)
SAMPLES = [key for key in sorted(recorded()) if SAMPLE_KEY.match(key)]
LAZY = LazyMARConfig(
    warmup=2, interval=4, probe_layer=1, keep_floor=2, head_interval=3, head_skip=(1,)
)


def images() -> torch.Tensor:
    return (recorded()["image"] / 255 - 0.5) / 0.5


@pytest.fixture
def tok() -> DeTok:
    model = tokenizer()
    model.set_statistics(recorded()["latent_mean"], recorded()["latent_std"])
    return model


def pixels(decoded: torch.Tensor) -> torch.Tensor:
    return ((decoded / 2 + 0.5).clamp(0, 1) * 255).to(torch.uint8).int()


# ---- the tokenizer -------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_the_rotary_factors_are_the_recorded_ones(tok, part):
    rope = getattr(tok, part).rope_tensor
    assert relative_error(rope, recorded()[f"tok_out/rope_{part}"]) < EXACT


def test_encoding_equals_the_recorded_moments_and_latents(tok):
    data = recorded()
    raw = tok.encoder(images()).flatten(2).transpose(1, 2)  # (B, L, 2C)
    assert relative_error(raw, data["tok_out/moments"]) < EXACT
    assert relative_error(tok.encode(images()).mode(), data["tok_out/latents"]) < EXACT
    tok.set_statistics(torch.zeros(16), torch.ones(16))
    assert relative_error(tok.encode(images()).mode(), data["tok_out/latents_raw"]) < EXACT
    tok.set_statistics(0.25, 1.75)
    assert relative_error(tok.encode(images()).mode(), data["tok_out/latents_single"]) < EXACT


def test_a_draw_from_the_posterior_equals_the_recorded_one(tok):
    data = recorded()
    stream = np.random.RandomState(int(data["tok_out/noise_seed"]))
    noise = torch.from_numpy(stream.standard_normal((2, 64, 16)).astype(np.float32))
    noise = noise.transpose(1, 2).unflatten(2, (8, 8))
    drawn = tok.encode(images()).sample(noise=noise)
    assert relative_error(drawn, data["tok_out/latents_sampled"]) < EXACT


def test_decoding_equals_the_recorded_images(tok):
    data = recorded()
    decoded = tok.decode(data["tok_out/latents"])
    assert relative_error(decoded, data["tok_out/decoder"]) < EXACT
    assert (pixels(decoded) - data["tok_out/pixels_u8"].int()).abs().max() <= 1


def test_moments_that_are_stored_give_the_same_draws(tok):
    posterior = tok.encode(images())
    again = type(posterior)(posterior.parameters.clone())
    noise = torch.randn_like(posterior.mean)
    assert torch.equal(again.sample(noise=noise), posterior.sample(noise=noise))


def test_names_shapes_and_their_order_are_those_of_the_published_tokenizer():
    with torch.device("meta"):
        model = DeTok()
    ours = [(key, tuple(tensor.shape)) for key, tensor in model.state_dict().items()]
    assert ours == list(load_shapes("detok_BB", SHAPES).items())
    assert (len(ours), model.stride, model.latent_scale) == (257, 16, 1.0)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == 171.713


def test_without_statistics_neither_direction_works():
    model = tokenizer()
    with pytest.raises(ValueError, match="set_statistics"):
        model.encode(images())
    with pytest.raises(ValueError, match="set_statistics"):
        model.decode(torch.zeros(1, 16, 8, 8))


@pytest.mark.parametrize(
    ("mean", "std", "words"),
    [
        (torch.zeros(15), torch.ones(16), r"mean has shape \(15,\)"),
        (torch.zeros(16), torch.ones(32), r"std has shape \(32,\)"),
        (torch.full((16,), float("nan")), torch.ones(16), "mean must be finite"),
        (torch.zeros(16), torch.zeros(16), "std positive"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(mean, std, words):
    with pytest.raises(ValueError, match=words):
        tokenizer().set_statistics(mean, std)


def test_another_geometry_encodes_and_decodes_its_own_size():
    torch.manual_seed(0)
    encoder = {"width": 64, "layers": 1, "heads": 4}
    model = DeTok(24, 8, 5, encoder, {"width": 24, "layers": 2, "heads": 2}).eval()
    model.set_statistics(torch.arange(5.0), torch.arange(1.0, 6.0))
    x = torch.rand(2, 3, 24, 24) * 2 - 1
    latents = model.encode(x).mode()
    assert latents.shape == (2, 5, 3, 3)
    raw = model.encoder(x)[:, :5]
    torch.testing.assert_close(latents[:, 4], (raw[:, 4] - 4) / 5)
    assert model.decode(latents).shape == x.shape
    torch.testing.assert_close(model.encode(x[1:]).mode(), latents[1:])
    torch.testing.assert_close(model.decode(latents), model.decoder(raw))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"img_size": 250}, "250 is not a multiple of patch_size 16"),
        ({"encoder": {**BASE, "heads": 128}}, "width 768 with 128 heads gives 6"),
    ],
)
def test_an_impossible_geometry_is_named(change, words):
    with torch.device("meta"), pytest.raises(ValueError, match=words):
        DeTok(**change)


def test_images_and_latents_of_another_size_are_refused(tok):
    with pytest.raises(ValueError, match=r"\(B, 3, 128, 128\)"):
        tok.encode(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"\(B, 16, 8, 8\)"):
        tok.decode(torch.zeros(1, 16, 4, 4))


def test_bf16_changes_the_image_little_and_keeps_moments_in_float32(tok):
    latents = recorded()["tok_out/latents"]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        decoded, posterior = tok.decode(latents), tok.encode(images())
    assert relative_error(decoded, recorded()["tok_out/decoder"]) < 0.03
    assert posterior.parameters.dtype == torch.float32
    assert relative_error(posterior.mean, latents) < 0.03


# ---- MAR -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("mar_base", {"diffloss_d": 6, "diffloss_w": 1024}),
        ("mar_large", {"diffloss_d": 8, "diffloss_w": 1280}),
    ],
)
def test_keys_and_shapes_are_those_of_the_published_mar(name, head):
    with torch.device("meta"):
        model = mar.__dict__[name](**head)
    ours = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert ours == load_shapes(name, SHAPES)


@torch.no_grad()
def test_encoder_and_decoder_equal_the_recorded_ones():
    data, model = recorded(), detok_mar()
    embedding = model.class_emb(data["labels"])
    encoded = model.forward_mae_encoder(data["one/tokens"], data["one/mask"], embedding)
    assert relative_error(encoded, data["one/encoder"]) < EXACT
    decoded = model.forward_mae_decoder(encoded, data["one/mask"])
    assert relative_error(decoded, data["one/decoder"]) < EXACT
    assert torch.equal(model.patchify(data["one/latents"]), data["one/patchify"])


@torch.no_grad()
def test_the_head_its_guidance_and_its_losses_equal_the_recorded_ones():
    data, head = recorded(), detok_mar().diffloss
    x, t, z = data["head/x"], data["head/t"], data["head/z"]
    assert relative_error(head.net(x, t, z), data["head/out"]) < EXACT
    half = x.chunk(2)[0].repeat(2, 1)
    epsilon, fraction, _ = guide(head.net(half, t, z), len(half) // 2, 2.5)
    guided = torch.cat([epsilon, fraction], dim=1)
    assert relative_error(guided, data["head/out_cfg2.5"].chunk(2)[0]) < EXACT
    noise = data["head/noise"]
    terms = head.train_diffusion.training_losses(head.net, x, t, {"c": z}, noise=noise)
    for name in ("loss", "mse", "vb"):
        assert relative_error(terms[name], data[f"head/loss_{name}"]) < EXACT, name


@pytest.mark.parametrize(("steps", "suffix"), [("ddim100", ""), ("100", "_100")])
def test_timesteps_and_betas_equal_the_recorded_ones(steps, suffix):
    data, head = recorded(), detok_mar(steps).diffloss
    assert head.gen_diffusion.timestep_map == data[f"schedule/timestep_map{suffix}"].tolist()
    betas = data[f"schedule/gen_betas{suffix}"].numpy()
    assert np.allclose(head.gen_diffusion.betas, betas, rtol=1e-12)
    train = data["schedule/train_betas"].numpy()
    assert np.allclose(head.train_diffusion.betas, train, rtol=1e-12)


def sample(key: str, **changes: object) -> torch.Tensor:
    spaced, steps, cfg, constant, temperature, nolabels = SAMPLE_KEY.match(key).groups()
    return detok_mar("100" if spaced else "ddim100").sample_tokens(
        2,
        int(steps),
        float(cfg),
        "constant" if constant else "linear",
        None if nolabels else recorded()["labels"],
        float(temperature or 1.0),
        noise=detok_noise(),
        **changes,
    )


def test_every_recorded_sample_is_compared():
    assert len(SAMPLES) == 8


@pytest.mark.parametrize("key", SAMPLES)
def test_sampled_latents_equal_the_recorded_ones(key):
    assert relative_error(sample(key), recorded()[key]) < SAMPLED


def test_the_chain_from_labels_to_pixels_equals_the_recorded_one(tok):
    decoded = tok.decode(sample("sample/T16_cfg3"))
    assert relative_error(decoded[:1], recorded()["tok_out/decoder_of_sample"]) < SAMPLED
    assert (pixels(decoded) - recorded()["tok_out/sample_u8"].int()).abs().max() <= 1


# ---- LazyMAR -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("caches", [*((name,) for name in CACHES), CACHES], ids="-".join)
def test_each_cache_changes_the_latents_and_keeps_them_near(caches):
    plain = recorded()["sample/T16_cfg3"]
    lazy = sample("sample/T16_cfg3", lazy_mar=LAZY.with_caches(caches))
    assert 1e-4 < relative_error(lazy, plain) < 1.5


@pytest.mark.parametrize(
    "config",
    [LAZY.with_caches(()), replace(LAZY, interval=1, head_cache=False)],
    ids=["no cache", "interval 1"],
)
def test_without_a_lazy_step_and_a_head_cache_the_latents_are_the_recorded_ones(config):
    lazy = sample("sample/T16_cfg3", lazy_mar=config)
    assert relative_error(lazy, recorded()["sample/T16_cfg3"]) < SAMPLED


def test_the_published_constants_run():
    lazy = sample("sample/T16_cfg3", lazy_mar=replace(LazyMARConfig(), probe_layer=2))
    assert 1e-4 < relative_error(lazy, recorded()["sample/T16_cfg3"]) < 1.5


# ---- training ------------------------------------------------------------------------------------------


def dropouts(**changes: object) -> list[tuple[float, float, float]]:
    small = {"diffloss_d": 1, "diffloss_w": 16, "proj_dropout": 0.3, "attn_dropout": 0.2}
    with torch.device("meta"):
        model = mar.mar_tiny(**small, **changes)
    blocks = [*model.encoder_blocks, *model.decoder_blocks]
    return [(b.attn.attn_drop, b.attn.proj_drop.p, b.mlp.drop.p) for b in blocks]


def test_dropout_in_the_mlp_can_be_left_out_and_that_of_the_attention_stays():
    assert set(dropouts()) == {(0.2, 0.3, 0.3)}
    assert set(dropouts(no_dropout_in_mlp=True)) == {(0.2, 0.3, 0.0)}
