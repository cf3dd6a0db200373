"""MAR.forward: what a training step masks, decodes and asks for."""

import math

import pytest
import torch

from models.mar import compile_for_training
from tests.support.sampling import small_mar

LATENTS = (6, 4, 8, 8)  # of small_mar


def record(monkeypatch, model):
    """Arguments of the transformer and of the head in one training step."""
    seen = {}
    predict, head = model.predict, model.diffloss.forward

    def spy_predict(known, order, stop, embedding):
        seen.update(known=known.shape[1], order=order, stop=stop, embedding=embedding)
        return predict(known, order, stop, embedding)

    def spy_head(target, z, **noise):
        seen.update(target=target, z=z, **noise)
        return head(target, z, **noise)

    monkeypatch.setattr(model, "predict", spy_predict)
    monkeypatch.setattr(model.diffloss, "forward", spy_head)
    return seen


@pytest.mark.parametrize("seed", range(5))
def test_the_loss_is_on_the_masked_tokens_and_repeats_them(monkeypatch, seed):
    model = small_mar(diffusion_batch_mul=3).train()
    seen = record(monkeypatch, model)
    latents = torch.randn(LATENTS)
    torch.manual_seed(seed)
    loss = model(latents, torch.arange(6) % 5)
    assert loss.ndim == 0
    masked = 64 - seen["known"]
    assert math.ceil(0.7 * 64) <= masked <= 64
    assert (seen["order"].sort(dim=1).values == torch.arange(64)).all()
    tokens = model.patchify(latents)
    hidden = seen["order"][:, seen["known"] :]
    expected = tokens.gather(1, hidden[:, :, None].expand(-1, -1, 4))  # (6, n, 4)
    repeated = expected[:, None].expand(-1, 3, -1, -1).flatten(0, 2)
    assert torch.equal(seen["target"], repeated)
    each = seen["noise"].view(6, 3, masked, 4)
    assert not torch.equal(each[:, 0], each[:, 1])
    assert seen["t"].shape == repeated.shape[:1]


def test_masked_keep_decodes_only_a_share_of_them(monkeypatch):
    model = small_mar(masked_keep=0.25).train()
    seen = record(monkeypatch, model)
    model(torch.randn(LATENTS), torch.zeros(6, dtype=torch.long))
    masked = 64 - seen["known"]
    assert seen["stop"] - seen["known"] <= round(64 * 0.25)
    assert seen["order"].shape[1] == seen["stop"] < seen["known"] + masked


@pytest.mark.parametrize(("probability", "dropped"), [(0.0, 0), (1.0, 6)])
def test_labels_are_dropped_for_guidance(monkeypatch, probability, dropped):
    model = small_mar(label_drop_prob=probability).train()
    seen = record(monkeypatch, model)
    model(torch.randn(LATENTS), torch.arange(6) % 5)
    assert (seen["embedding"] == model.fake_latent).all(dim=1).sum() == dropped


def test_the_auxiliary_error_is_added_to_the_loss():
    latents, labels = torch.randn(LATENTS), torch.zeros(6, dtype=torch.long)
    losses = []
    for weight in (0.0, 1.0, 2.0):
        model = small_mar(aux_weight=weight, attn_dropout=0.0, proj_dropout=0.0)
        torch.manual_seed(3)
        losses.append(model(latents, labels).item())
    assert losses[1] > losses[0]
    assert losses[2] - losses[1] == pytest.approx(losses[1] - losses[0], rel=1e-4)


def test_checkpointing_changes_neither_loss_nor_gradients():
    results = []
    for checkpointing in (False, True):
        model = small_mar(
            grad_checkpointing=checkpointing, attn_dropout=0.0, proj_dropout=0.0
        ).train()
        torch.manual_seed(4)
        loss = model(torch.randn(LATENTS), torch.arange(6) % 5)
        loss.backward()
        results.append((loss, [p.grad for p in model.parameters()]))
    (plain, gradients), (saved, others) = results
    assert torch.allclose(plain, saved)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients, others, strict=True))


@pytest.mark.parametrize("shape", [(6, 8, 8, 8), (6, 4, 4, 16), (6, 4, 16, 16)])
def test_latents_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"trains on \(B, 4, 8, 8\)"):
        small_mar()(torch.randn(shape), torch.zeros(6, dtype=torch.long))


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ({"mask_ratio_min": 1.0}, "mask_ratio_min is 1.0"),
        ({"masked_keep": 0.0}, "masked_keep is 0.0"),
        ({"img_size": 30}, "img_size 30"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"decoder_depth": 0}, "decoder_depth is 0"),
        ({"buffer_size": -1}, "buffer_size is -1"),
        ({"num_sampling_steps": "fast"}, "'fast'"),
        ({"num_sampling_steps": "ddim600"}, "600 steps do not divide 1000 timesteps evenly"),
        ({"pos_init": "random"}, "'random'"),
    ],
)
def test_impossible_models_are_refused(argument, named):
    with pytest.raises(ValueError, match=named):
        small_mar(**argument)


def test_the_noise_of_a_step_is_a_function_of_its_seed_and_can_be_split():
    model = small_mar(diffusion_batch_mul=2, attn_dropout=0.0, proj_dropout=0.0).train()
    latents, labels = torch.randn(LATENTS), torch.arange(6) % 5
    noise = model.training_noise(6, seed=3)
    whole = model(latents, labels, noise)
    assert torch.equal(whole, model(latents, labels, model.training_noise(6, seed=3)))
    assert not torch.equal(whole, model(latents, labels, model.training_noise(6, seed=4)))
    parts = [
        model(latents[i:j], labels[i:j], noise.part(i, j)) for i, j in ((0, 2), (2, 4), (4, 6))
    ]
    assert torch.stack(parts).mean().item() == pytest.approx(whole.item(), rel=1e-5)


@pytest.mark.slow
def test_compiled_training_has_the_same_gradients():
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = small_mar(attn_dropout=0.0, proj_dropout=0.0).train()
        names = list(model.state_dict())
        if compiled:
            compile_for_training(model)
        assert list(model.state_dict()) == names
        latents, labels = torch.randn(LATENTS), torch.arange(6) % 5
        for seed in (1, 2, 3):  # other mask ratios
            loss = model(latents, labels, model.training_noise(6, seed=seed))
            loss.backward()
        results.append((loss, [p.grad for p in model.parameters()]))
    (plain, gradients), (compiled, others) = results
    assert torch.allclose(plain, compiled, rtol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(gradients, others, strict=True))
