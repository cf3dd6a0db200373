"""A family is one file and one line: a toy that paints plain colours from prompts, defined here."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import engine
import eval as eval_script
from engine import cli
from engine.base import Family, Host, Loaded
from tests.support.runs import folder_of, images_of, manifest_of, pixels_of, written_at
from util import report
from util.config import setting
from util.errors import UserError

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "grey": (96, 96, 96)}
PROMPTS = ["a red wall", "a green wall", "", "a blue wall", "a grey wall"]  # one line is empty
COLOUR_OF_PROMPT = ["red", "green", "blue", "grey"]


@dataclass(frozen=True)
class PaintConfig:
    """Flags that only the toy has."""

    paint_size: int = setting(64, "pixels per side", least=1)
    paint_grain: float = setting(20.0, "deviation of the grain", least=0)


class Painter:
    """Plain colours with the grain of each image's own seed."""

    def __init__(self, config: PaintConfig) -> None:
        self.config, self.asked = config, []

    def prepare(self, conditions, seeds):
        self.asked += conditions
        size, grain = self.config.paint_size, self.config.paint_grain
        images = []
        for prompt, seed in zip(conditions, seeds, strict=True):
            colour = next(colour for name, colour in COLOURS.items() if name in prompt)
            noise = np.random.default_rng(seed).normal(0, grain, (3, size, size))
            images.append(np.array(colour)[:, None, None] + noise)
        return torch.from_numpy(np.stack(images)).float()

    def generate(self, prepared):
        return (prepared / 127.5 - 1).clamp(-1, 1)


@dataclass(frozen=True)
class ToyHost(Host):
    model: str
    paint: PaintConfig

    def load(self, device):
        return Loaded(nn.Identity(), nn.Identity(), "no weights")

    def generator(self, loaded, execution):
        return Painter(self.paint)

    def config(self, loaded, dtype):
        return dict(vars(self.paint))

    def summary(self):
        method = {"method": "paint", "num_iter": 1, "cfg": 1.0}
        return {**method, "lazy_mar": False, "line_ar": False}

    def run_name(self, num_images):
        return f"{self.model}-{num_images}"

    def flops_per_image(self, model):
        return 3.0 * self.paint.paint_size**2


class ToyFamily(Family):
    name = "Toy"
    presets = {
        "toy": {
            "features": "shapes",
            "features_path": "pretrained_models/mar_tiny/classifier.safetensors",
            "fid_stats": "pretrained_models/mar_tiny/fid_stats.npz",
        }
    }

    def add_flags(self, parser):
        parser.add(PaintConfig, "paint", owner=self.name)

    def host(self, model, flags, defaults):
        return ToyHost(model, flags.build(PaintConfig, defaults))


@pytest.fixture
def paint(one_thread, monkeypatch, document_of, tmp_path):
    """Calls eval.py with the toy registered; returns its last line, parsed."""
    monkeypatch.setitem(engine.FAMILIES, "Toy", ToyFamily())
    prompts = tmp_path / "walls.txt"
    prompts.write_text("\n".join(PROMPTS))

    def call(*flags: object, model: str = "toy", out: Path = tmp_path / "out") -> dict:
        words = ["--model", model, "--prompts", prompts, "--num_images", 10, "--eval_bsz", 4]
        words += ["--device", "cpu", "--threads", 1, "--output_dir", out, *flags]
        return document_of(eval_script, *words)

    return call


def test_a_run_has_the_images_of_its_prompts_in_order_and_starts_again_from_the_first(paint):
    result = paint("--no_score")
    assert (result["model"], result["method"], result["generated"]) == ("toy", "paint", 10)
    means = pixels_of(result).mean(axis=(1, 2))  # (10, 3)
    for i, mean in enumerate(means):
        colour = COLOURS[COLOUR_OF_PROMPT[i % 4]]
        assert np.abs(mean - colour).max() < 20, i
    assert len(set(images_of(result))) == 10  # each has a grain of its own
    config = manifest_of(result)["config"]
    assert config["prompts"].startswith("walls.txt 4 ")
    assert config["paint_size"] == 64
    assert "class_num" not in config


def test_deleted_images_come_back_with_the_same_bits_and_no_other_is_made(paint):
    first = paint("--no_score")
    images, times = images_of(first), written_at(first)
    for name in ("00002.png", "00005.png"):
        (Path(first["images_dir"]) / name).unlink()
    again = paint("--no_score")
    assert images_of(again) == images
    assert again["generated"] == 12
    rewritten = [name for name in times if written_at(again)[name] != times[name]]
    assert sorted(rewritten) == ["00002.png", "00005.png"]


def test_a_run_is_scored_at_once_later_and_without_being_saved(paint, document_of):
    result = paint("--save_npz")
    assert result["fid"] > 1
    assert 1 <= result["is_mean"] <= 10
    assert "accuracy" not in result  # a prompt is no label
    with np.load(folder_of(result) / "samples.npz") as batch:
        assert np.array_equal(batch["arr_0"], pixels_of(result))
        assert batch.files == ["arr_0"]
    names = ("fid", "is_mean", "is_std")
    expected = {name: result[name] for name in names}
    streamed = paint("--no_save", out=folder_of(result).parent / "streamed")
    assert {name: streamed[name] for name in names} == pytest.approx(expected, rel=1e-6)
    later = document_of(eval_script, "--device", "cpu", "--score_only", folder_of(result))
    assert {name: later[name] for name in names} == pytest.approx(expected, rel=1e-6)
    assert report.load_run(folder_of(result))["prompts"] == result["config"]["prompts"]


def test_a_dry_run_counts_the_toys_operations(paint, tmp_path):
    plan = paint("--dry_run", "--no_score", "--paint_size", 32)
    assert (plan["to_make"], plan["flops_per_image"]) == ([10], 3 * 32**2)
    assert not (tmp_path / "out").exists()


def test_other_prompts_are_another_run(paint, tmp_path):
    paint("--no_score")
    other = tmp_path / "other.txt"
    other.write_text("a red wall\n")
    with pytest.raises(UserError, match=r"holds a run with prompts 'walls\.txt 4 .*other\.txt 1 "):
        paint("--no_score", "--prompts", other)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--model toy", "--model toy draws from text: give --prompts FILE"),
        ("--model toy --prompts none.txt", "--prompts none.txt cannot be read"),
        ("--model mar_tiny --prompts none.txt", "--prompts is for text-to-image models; mar_tiny"),
        ("--model toy --lazy_mar", "--lazy_mar is for MAR models; --model toy is a Toy model"),
        ("--model mar_tiny --paint_size 8", "--paint_size is for Toy models; --model mar_tiny is"),
        ("--model toy --paint_size 0", "--paint_size is 0; it must be a number of at least 1"),
        ("--model none", "--model none is unknown; use one of mar_base"),
    ],
)
def test_flags_and_prompts_that_do_not_fit_are_refused(monkeypatch, words, sentence):
    monkeypatch.setitem(engine.FAMILIES, "Toy", ToyFamily())
    with pytest.raises(UserError) as error:
        selection = cli.parse("eval", words=words.split())
        selection.host().conditions(selection.flags.value("prompts"))
    assert sentence in str(error.value)
