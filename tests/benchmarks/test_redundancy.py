"""The redundancy figures show what a plain run computes, and what a lazy run really recomputes."""

import json
import sys
from functools import partial

import numpy as np
import pytest
import torch

from benchmarks import plots, redundancy
from benchmarks.redundancy import GROUPS, Observer, Request, lazy_strip, measure, positions_of
from models.decoding import Decoding
from models.lazy_mar import LazyMARConfig, step_policies
from models.plan import DecodingPlan
from tests.support.golden_data import relative_error
from tests.support.sampling import CLOSE, noise_of, sample, small_mar
from util.errors import UserError
from util.images import read_image

CONFIG = LazyMARConfig(warmup=2, interval=4, keep_floor=3, keep=((0, 1.0), (0.5, 0.2)))


@pytest.fixture(scope="module")
def observed():
    """A plain run of two images with its Observer: (model, plan, observer, tokens, order)."""
    model = small_mar()
    plan = DecodingPlan.create(model.seq_len, 12, 3.0)
    decoding = Decoding(model, 2, plan, None, 1.0, predictor=partial(Observer, ages=3))
    observer = decoding.predictor
    tokens = decoding([1, 2], noise_of(model, (3, 4)))
    return model, plan, observer, tokens, decoding


def test_observing_changes_nothing(observed):
    model, _, _, tokens, _ = observed
    assert relative_error(model.unpatchify(tokens), sample(model)) < CLOSE


def test_every_token_is_in_one_group_at_every_step(observed):
    _, plan, *_ = observed
    for step in plan.steps:
        parts = positions_of(step, 64).values()
        assert [p for part in parts for p in range(64)[part]] == list(range(64))
    assert len(range(64)[positions_of(plan.steps[5], 64)["now"]]) == plan.steps[5].stop - (
        plan.steps[5].start
    )


@torch.no_grad()
def test_similarities_are_those_of_the_decoder_run_step_by_step(observed):
    model, plan, observer, _, decoding = observed
    order, ranked = decoding.order[:2], decoding.tokens
    outputs = []
    for step in plan.steps[4:6]:
        known = model.embed_known(
            ranked[:, : step.start], order[:, : step.start], decoding.embedding[:2]
        )
        x = model.decode(model.embed_decoder(model.encode(known), order))
        outputs.append(x[:, model.buffer_size :])
    expected = torch.cosine_similarity(*outputs, dim=-1)
    assert torch.allclose(observer.similarity[4][-1], expected, atol=1e-5)
    assert torch.allclose(observer.guidance[4][0], expected, atol=1e-5)
    assert observer.similarity[4].shape == (5, 2, 64)


def test_a_residual_that_stays_is_reused_without_error_and_the_branch_is_not():
    observer = Observer(None, None, None, ages=2)
    residual = torch.randn(1, 6, 8)
    for _ in range(3):
        conditional = torch.randn(1, 6, 8)
        output = torch.cat([conditional, conditional + residual])
        observer._compare([conditional], output, slice(2, 5))
    (errors,) = observer.errors  # (2 ages of the branch, 2 of the residual, none; tokens)
    assert errors.shape == (5, 3)
    assert errors[2:4].max() < 1e-6
    assert errors[:2].min() > 0.1
    expected = residual[0, 2:5].norm(dim=-1) / output[1, 2:5].norm(dim=-1)
    assert torch.allclose(errors[4], expected)
    assert torch.allclose(observer.guidance[-1][2], torch.ones(1, 6))


def test_maps_show_the_positions_that_a_lazy_run_recomputes():
    model = small_mar()
    plan = DecodingPlan.create(model.seq_len, 12, 3.0)
    strip, latents = lazy_strip(model, plan, CONFIG, 1, noise_of(model, (3,)))
    alone = model.sample_tokens(
        1, 12, 3.0, labels=[1], noise=noise_of(model, (3,)), lazy_mar=CONFIG
    )
    assert relative_error(latents, alone) < CLOSE
    policies = step_policies(CONFIG, plan, model.buffer_size)
    for step, drawn in zip(plan.steps, strip["maps"], strict=True):
        policy = policies[step.index]
        assert drawn.count("n") == step.stop - step.start
        assert drawn.count("p") == step.start - step.previous
        computed = 64 - drawn.count(".")
        if policy.refresh or policy.kept == 64 + model.buffer_size:
            assert computed == 64
        else:  # some of the kept positions may lie in the buffer
            assert policy.kept - model.buffer_size <= computed <= policy.kept
        ranks = [strip["ranks"][position] for position in range(64) if drawn[position] == "n"]
        assert sorted(ranks) == list(range(step.start, step.stop))
    assert any("." in drawn for drawn in strip["maps"])


def test_numbers_are_measured_for_every_step_layer_and_age():
    model = small_mar()
    plan = DecodingPlan.create(model.seq_len, 12, 3.0)
    with torch.no_grad():
        document, latents = measure(model, plan, Request([1, 2], [3, 4], CONFIG), 1.0)
    tokens, guidance = document["tokens"], document["guidance"]
    assert all(len(tokens["by_step"][g]) == 11 and len(tokens["by_layer"][g]) == 5 for g in GROUPS)
    assert tokens["by_step"]["earlier"][0] is None  # step 1: nothing was decoded before step 0
    assert tokens["by_step"]["later"][-1] is None  # the last step leaves nothing
    assert guidance["ages"] == [1, 2, 3]
    assert guidance["error"]["unconditional"][0] < guidance["error"]["unconditional"][2]
    assert latents.shape == (1, 4, 8, 8)


@pytest.fixture
def script(one_thread, monkeypatch, tmp_path):
    def call(*flags: object) -> None:
        words = f"redundancy.py --num_images 1 --num_iter 12 --device cpu --output {tmp_path}/red"
        monkeypatch.setattr(sys, "argv", [*words.split(), *map(str, flags)])
        redundancy.main()

    return call


def test_the_script_writes_three_figures_and_their_numbers(script, monkeypatch, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(plots, "DPI", 50)
    script("--num_sampling_steps", "ddim10")
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document == json.loads((tmp_path / "red.json").read_text())
    assert {"command", "commit", "weights", "device", "dtype", "seed"} <= document["about"].keys()
    text = (tmp_path / "red.md").read_text()
    assert "| 4 | " in text and "probe layer.\n\n    command: " in text
    for name in ("tokens", "guidance", "strip"):
        picture = read_image(tmp_path / f"red_{name}.png")
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--cfg", 1), "--cfg is 1"),
        (("--num_iter", 9), "features as old as --interval 9 allows need more"),
        (("--num_iter", 2, "--interval", 1), "makes 2 steps"),
        (("--model", "gpt_tiny"), "is for MAR models; --model gpt_tiny is a GPT model"),
        (("--preset", "fast"), "--preset is not measured here"),
        (("--diff_upper_steps", 20), "--diff_upper_steps is not measured here"),
        (("--resume", "nowhere"), "no checkpoint at nowhere"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_sentence(script, tmp_path, flags, reason):
    with pytest.raises(UserError, match=reason):
        script(*flags)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_extra_is_named(script, monkeypatch):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install '\.\[figures\]'"):
        script()
