"""demo.py: what it draws, in this process; and its page in a real browser (`make test-browser`)."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from importlib.util import find_spec
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

import demo
from engine import cli
from models import mar
from models.linear_tokenizer import LinearTokenizer
from tests.support import ROOT
from util.errors import UserError
from util.images import to_uint8
from util.weights import load_into

HOST = cli.named("mar_tiny", lazy_mar=True).host()
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
REQUEST = demo.Request(label=0, seed=0, num_iter=12, cfg=3.0)
PICTURES = """[...document.querySelectorAll("img[src*='/file=']")]"""


@pytest.fixture(scope="module")
def bundled():
    model = mar.mar_tiny(num_sampling_steps="ddim10").eval()
    load_into(model, ROOT / HOST.resume)
    return model, LinearTokenizer.from_file(ROOT / HOST.tokenizer.vae_path)


def side_by_side(bundled, cfg_schedule, temperature):
    model, tokenizer = bundled
    sampling = replace(HOST.sampling, cfg_schedule=cfg_schedule, temperature=temperature)
    return demo.SideBySide(model, tokenizer, tokenizer.latent_scale, sampling, torch.float32)


@pytest.fixture(scope="module")
def side(bundled):
    return side_by_side(bundled, "linear", 1.0)


@pytest.mark.parametrize(("schedule", "temperature"), [("linear", 1.0), ("constant", 0.9)])
def test_the_pictures_are_those_of_sample_tokens_for_the_same_seed(bundled, schedule, temperature):
    model, tokenizer = bundled
    side = side_by_side(bundled, schedule, temperature)
    pictures = side.pair(demo.Request(label=4, seed=7, num_iter=10, cfg=3.0))
    for picture, lazy_mar in zip(pictures, (None, side.sampling.lazy_mar), strict=True):
        latents = model.sample_tokens(
            1, 10, 3.0, schedule, [4], temperature, noise=model.image_noise([7]), lazy_mar=lazy_mar
        )
        expected = to_uint8(tokenizer.decode(latents / tokenizer.latent_scale))[0]
        assert np.array_equal(picture.image, expected)
        assert picture.seconds > 0
    assert not np.array_equal(pictures[0].image, pictures[1].image)


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"label": 10}, "label 10"), ({"seed": -1}, "seed -1"), ({"num_iter": 0}, "num_iter is 0")],
)
def test_what_cannot_be_drawn_is_named(side, change, reason):
    with pytest.raises(ValueError, match=reason):
        side.pair(replace(REQUEST, **change))


@pytest.mark.parametrize("preset", [{}, {"preset": "fast"}], ids=str)
def test_an_image_grows_to_the_picture_of_the_pair(bundled, preset):
    model, tokenizer = bundled
    sampling = cli.named(
        "mar_tiny", lazy_mar=True, diff_upper_steps=8, diff_lower_steps=4, **preset
    )
    sampling = sampling.host().sampling
    side = demo.SideBySide(model, tokenizer, tokenizer.latent_scale, sampling, torch.float32)
    frames = list(side.grow(REQUEST))
    _, lazy = side.pair(REQUEST)
    assert np.array_equal(frames[-1].image, lazy.image)
    grey = [(frame.image == demo.UNKNOWN).all(axis=2).sum() for frame in frames]
    assert grey == sorted(grey, reverse=True) and grey[0] > 3000
    now = [(frame.tokens == demo.COLOURS["n"]).all(axis=2).sum() for frame in frames]
    assert sum(now) == model.seq_len
    assert any((frame.tokens == demo.COLOURS["."]).all(axis=2).any() for frame in frames)


def test_editing_keeps_what_is_not_painted(side):
    _, lazy = side.pair(REQUEST)
    painted = np.zeros((384, 384), bool)
    painted[:96, 200:] = True
    pictures = side.edit(replace(REQUEST, seed=9), demo.enlarged(lazy.image), painted)
    pixels = torch.from_numpy(lazy.image).permute(2, 0, 1)[None] / 127.5 - 1
    kept = to_uint8(side.tokenizer.decode(side.tokenizer.encode(pixels).mode()))[0].astype(int)
    for picture in pictures:
        change = np.abs(picture.image - kept).max(axis=2)
        assert change[24:].max() <= 1 and change[:, :28].max() <= 1
        assert change[:16, 33:].max() > 16
    with pytest.raises(ValueError, match="nothing is painted"):
        side.edit(REQUEST, lazy.image, np.zeros((64, 64), bool))


def test_the_page_streams_frames_and_then_both_pictures(side):
    *frames, last = demo.Page(side).sample(2, 3, 6, 3.0)
    assert len(frames) == 6 and all(frame[0] is None for frame in frames)
    assert last[0].shape == last[1].shape == last[4].shape == (384, 384, 3)
    assert "times as fast" in last[3]
    (refused,) = demo.Page(side).sample(None, 3, 6, 3.0)
    assert refused[3] == "Cannot draw this: class and seed are whole numbers from 0"


def test_the_editor_hands_over_its_layers(side):
    background = np.full((128, 128, 4), 200, np.uint8)
    layer = np.zeros((128, 128, 4), np.uint8)
    actions, controls = demo.Page(side), (2, 3, 6, 3.0)
    nothing = actions.edit({"background": background, "layers": [layer]}, *controls)
    assert nothing[2].startswith("Cannot draw this: nothing is painted")
    layer[:40, :40, 3] = 255
    plain, _, text = actions.edit({"background": background, "layers": [layer]}, *controls)
    assert plain.shape == (384, 384, 3) and "PSNR" in text
    assert actions.edit(None, *controls)[2].startswith("Cannot draw this: there is no picture")


def test_the_caption_compares_seconds_and_pixels():
    image = np.full((2, 2, 3), 100, np.uint8)
    plain, lazy = demo.Picture(image, 3.0), demo.Picture(image + np.uint8(10), 1.5)
    assert "LazyMAR 1.50 s: 2.00 times as fast; PSNR 28.1 dB" in demo.caption(plain, lazy)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--model", "gpt_tiny"], "gpt_tiny is not a MAR model: use one of mar_base"),
        (["--port", "x"], "--port"),
        (["--port", "99999"], "--port is 99999"),
        (["--num_imges", "4"], "unrecognized arguments: --num_imges 4"),
        (["--top_k", "5"], "--top_k is for GPT, Janus and Lumina models"),
    ],
)
def test_flags_that_do_not_fit_are_refused(monkeypatch, flags, reason):
    monkeypatch.setattr(sys, "argv", ["demo.py", *flags])
    with pytest.raises(UserError, match=reason):
        demo.main()


def test_without_gradio_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install '\.\[demo\]'"):
        demo.main()


@pytest.fixture
def gradio(monkeypatch):
    """Records what the page asks of gradio."""
    recorder = MagicMock()
    monkeypatch.setitem(sys.modules, "gradio", recorder)
    monkeypatch.setattr(demo, "find_spec", lambda name: recorder)
    return recorder


def beginnings(gradio):
    """Label => lowest and highest value, if it has them, and the first one."""
    calls = (*gradio.Number.call_args_list, *gradio.Slider.call_args_list)
    return {call.kwargs["label"]: call.args for call in calls}


@pytest.mark.parametrize(
    ("flags", "seed", "steps", "guidance"),
    [
        ("", 1, (1, 256, 64), (1, 10, 3)),
        ("--seed 7 --num_iter 300 --cfg 12.5", 7, (1, 300, 300), (1, 12.5, 12.5)),
        ("--cfg 0.5", 1, (1, 256, 64), (0.5, 10, 0.5)),
    ],
)
def test_the_page_begins_with_what_the_flags_say(
    gradio, one_thread, monkeypatch, flags, seed, steps, guidance
):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--num_sampling_steps", "ddim10", *flags.split()])
    demo.main()
    assert beginnings(gradio) == {"seed": (seed,), "steps": steps, "guidance": guidance}


def test_without_names_the_page_begins_with_a_class_that_the_model_has(gradio, side):
    demo.page(side, None, 0)
    assert beginnings(gradio)["class"] == (9,)


# ---- in a browser --------------------------------------------------------------------------------------


@pytest.fixture
def browser():
    """A headless Chromium of this machine."""
    for package in ("gradio", "playwright"):
        if find_spec(package) is None:
            pytest.fail(f"{package} is missing: pip install '.[demo,browser]'", pytrace=False)
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None:
        pytest.fail("no Chromium: apt-get install chromium, or set CHROMIUM", pytrace=False)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def address(tmp_path):
    """demo.py in a process of its own, as soon as it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}/"
    log = (tmp_path / "demo.log").open("w+")
    command = [sys.executable, "demo.py", "--port", str(port)]
    with subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log) as process:
        try:
            for _ in range(240):
                try:
                    urllib.request.urlopen(address, timeout=5).close()
                    break
                except OSError:
                    assert process.poll() is None, (tmp_path / "demo.log").read_text()
                    time.sleep(0.5)
            yield address
        finally:
            process.terminate()


@pytest.mark.browser
def test_a_visitor_draws_with_both_methods_and_sees_errors(browser, address, tmp_path):
    page = browser.new_page(viewport={"width": 1100, "height": 820})
    page.set_default_timeout(60_000)
    page.goto(address)
    page.get_by_label("class").click()
    page.get_by_role("option", name="star").click()
    page.get_by_label("number input for steps").fill("16")
    page.get_by_role("button", name="Sample").click()
    said = page.get_by_text("times as fast")
    said.wait_for()
    assert "MAR" in said.inner_text()
    page.wait_for_function(f"{PICTURES}.every(picture => picture.naturalWidth == {demo.SHOWN})")
    assert len(set(page.evaluate(f"{PICTURES}.map(picture => picture.src)"))) == 3  # and the map
    page.screenshot(path=tmp_path / "pair.png")
    page.get_by_label("seed").fill("-1")
    page.get_by_role("button", name="Sample").click()
    page.get_by_text("seed -1 is negative").wait_for()
    page.screenshot(path=tmp_path / "refused.png")


@pytest.mark.browser
def test_a_visitor_paints_over_a_part_and_has_it_drawn_again(browser, address, tmp_path):
    page = browser.new_page(viewport={"width": 1300, "height": 900})
    page.set_default_timeout(60_000)
    page.goto(address)
    page.get_by_label("number input for steps").fill("16")
    page.get_by_role("button", name="Sample").click()
    page.get_by_text("times as fast").wait_for()
    page.get_by_role("tab", name="Edit").click()
    canvas = page.locator("canvas").first
    canvas.wait_for()
    page.wait_for_timeout(5000)  # the editor fits its picture
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.4 * box["height"])
    page.mouse.down()
    for share in (0.4, 0.5, 0.6, 0.7):
        page.mouse.move(box["x"] + share * box["width"], box["y"] + 0.5 * box["height"])
        page.wait_for_timeout(200)
    page.mouse.up()
    page.get_by_role("button", name="Draw the painted part").click()
    page.get_by_text("times as fast").filter(visible=True).wait_for()
    page.screenshot(path=tmp_path / "edited.png")
