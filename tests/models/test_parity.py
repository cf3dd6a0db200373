"""The contract: float32 on a CPU equals the recorded runs of the published implementations."""

import re

import numpy as np
import pytest
import torch

from models.decoding import Decoding
from models.denoiser import guide
from models.lazy_predictor import LazyPredictor
from tests.support.golden_data import (
    RECORDED,
    golden,
    golden_model,
    golden_noise,
    load_npz,
    relative_error,
)

EXACT, SAMPLED = 1e-5, 1e-4
SAMPLE_KEY = re.compile(r"(?:mar|lazy)_T(\d+)_cfg(\d+)(?:_(linear|constant))?(?:_temp([\d.]+))?$")
RUNS = [
    pytest.param(
        *(file, steps, key),
        id=f"{steps}-{key}",
        marks=[pytest.mark.slow] if "T256" in key else [],  # as long as all others together
    )
    for file, steps in (
        ("mar.npz", "ddim100"),
        ("lazymar.npz", "ddim100"),
        ("mar_steps100.npz", "100"),
        ("lazymar_steps100.npz", "100"),
    )
    for key in sorted(load_npz(file))
    if SAMPLE_KEY.match(key)
]


def test_every_recorded_sample_is_compared():
    assert len(RUNS) == 14


@pytest.mark.parametrize(("file", "steps", "key"), RUNS)
def test_sampled_latents_equal_the_recorded_ones(file, steps, key):
    num_iter, cfg, schedule, temperature = SAMPLE_KEY.match(key).groups()
    noise, labels = golden_noise(file)
    latents = golden_model(steps).sample_tokens(
        2,
        int(num_iter),
        float(cfg),
        schedule or "linear",
        labels,
        float(temperature or 1.0),
        noise=noise,
        lazy_mar=key.startswith("lazy"),
    )
    assert relative_error(latents, golden(file)[key]) < SAMPLED


@pytest.mark.parametrize(
    ("file", "steps"), [("mar.npz", "ddim100"), ("mar_steps100.npz", "100")], ids=["ddim", "100"]
)
class TestParts:
    @torch.no_grad()
    def test_encoder_decoder_and_patches(self, file, steps):
        data, model = golden(file), golden_model(steps)
        tokens = model.patchify(data["one_x"])
        assert torch.equal(tokens, data["one_tokens"])
        assert torch.equal(model.unpatchify(tokens), data["one_unpatchify"])
        embedding = model.class_emb(data["labels"])
        encoded = model.forward_mae_encoder(tokens, data["one_mask"], embedding)
        assert relative_error(encoded, data["one_encoder"]) < EXACT
        z = model.forward_mae_decoder(encoded, data["one_mask"])
        assert relative_error(z, data["one_decoder"]) < EXACT

    @torch.no_grad()
    def test_head_and_guidance(self, file, steps):
        data, net = golden(file), golden_model(steps).diffloss.net
        out = net(data["head_x"], data["head_t"], data["head_c"])
        assert relative_error(out, data["head_out"]) < EXACT
        # As the original: both halves see the first half of x; guided epsilon, own variance.
        half = data["head_x"].chunk(2)[0].repeat(2, 1)
        epsilon, fraction, _ = guide(net(half, data["head_t"], data["head_c"]), len(half) // 2, 2.5)
        conditional = torch.cat([epsilon, fraction], dim=1)
        assert relative_error(conditional, data["head_out_cfg2p5"].chunk(2)[0]) < EXACT

    def test_loss_and_its_terms(self, file, steps):
        data, head = golden(file), golden_model(steps).diffloss
        terms = head.train_diffusion.training_losses(
            head.net,
            data["loss_target"],
            data["head_t"],
            {"c": data["head_c"]},
            noise=data["loss_noise"],
        )
        for name in ("mse", "vb", "loss"):
            assert relative_error(terms[name], data[f"loss_{name}"]) < EXACT, name
        mean = (terms["loss"] * data["loss_mask"]).sum() / data["loss_mask"].sum()
        assert relative_error(mean, data["loss_masked_mean"]) < EXACT

    def test_timesteps_and_betas(self, file, steps):
        data, head = golden(file), golden_model(steps).diffloss
        assert head.gen_diffusion.timestep_map == data["gen_timestep_map"].tolist()
        assert np.allclose(head.gen_diffusion.betas, data["gen_betas"].numpy(), rtol=1e-12)
        assert np.allclose(head.train_diffusion.betas, data["train_betas"].numpy(), rtol=1e-12)


@RECORDED
def test_the_decoders_output_equals_the_recorded_one_step_by_step(monkeypatch, file, key):
    recorded = []
    original = Decoding._write_z

    def write(self, z):
        start = sum(rows.shape[1] for rows in recorded)
        raster = self.order[:, start : start + z.shape[1]].argsort(dim=1)
        recorded.append(z.gather(1, raster[:, :, None].expand_as(z)))
        original(self, z)

    monkeypatch.setattr(Decoding, "_write_z", write)
    noise, labels = golden_noise(file)
    golden_model().sample_tokens(
        2, 64, 3.0, labels=labels, noise=noise, lazy_mar=key.startswith("lazy")
    )
    expected = {k: v for k, v in golden(file).items() if k.startswith(f"{key}/z_step")}
    assert len(expected) == 9
    for name, z in expected.items():
        step = int(name.rsplit("step", 1)[1])
        assert relative_error(recorded[step].flatten(0, 1), z) < SAMPLED, name


def test_lazymar_keeps_the_recorded_positions(monkeypatch):
    selected = []
    original = LazyPredictor.select

    def select(self, v, step, kept):
        index = original(self, v, step, kept)
        selected.append(index)
        return index

    monkeypatch.setattr(LazyPredictor, "select", select)
    noise, labels = golden_noise("lazymar.npz")
    golden_model().sample_tokens(2, 64, 3.0, labels=labels, noise=noise, lazy_mar=True)

    data = golden("lazymar.npz")
    steps = data["lazy_T64_cfg3_linear/kept_steps"].tolist()
    kept = np.unpackbits(data["lazy_T64_cfg3_linear/kept"].numpy(), axis=-1).astype(bool)
    order = noise.orders.flip(1)
    positions = torch.cat([torch.arange(64).expand(2, -1), 64 + order], dim=1)  # of each rank
    ours = []
    for index in selected:
        mask = torch.zeros(2, 320, dtype=torch.bool)
        ours.append(mask.scatter(1, positions.gather(1, index), True).numpy())
    # Steps that keep everything select nothing.
    trimmed = [i for i in range(len(steps)) if not kept[i].all()]
    assert all(steps[i] < 20 for i in range(len(steps)) if i not in trimmed)
    assert len(ours) == len(trimmed)
    for mask, i in zip(ours, trimmed, strict=True):
        assert (mask.sum(1) == kept[i].sum(1)).all(), f"step {steps[i]}"
    agreement = (np.stack(ours) & kept[trimmed]).sum() / kept[trimmed].sum()
    assert agreement >= 0.995
