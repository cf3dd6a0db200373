"""MAR against LazyMAR in the browser: one class, one seed, both pictures side by side with their seconds.

    pip install '.[demo]'
    python demo.py                      # the bundled model
    python demo.py --model mar_huge     # an official one, after python -m util.download mar_huge vae

Flags of model, tokenizer, sampling and LazyMAR are those of eval.py; --num_iter, --cfg and --seed are what
the page begins with. Serves on this machine alone.
"""

import time
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
import torch

from engine import cli
from engine.mar import MARHost, SamplingConfig
from models.mar import MAR
from models.sampler import Sampler
from models.tokenizers import Tokenizer
from util.errors import UserError, run_main
from util.evaluation.config import EvaluationConfig
from util.images import to_uint8
from util.report import psnr
from util.shapes import CLASSES

if TYPE_CHECKING:
    import gradio

SHOWN = 384  # least pixels of a picture on the page
START_CLASS = 207  # of ImageNet: golden retriever, the first of the README's example
MOST_STEPS, MOST_GUIDANCE = 256, 10  # ends of the sliders, unless more is asked for


@dataclass(frozen=True)
class Picture:
    """image uint8 (H, W, 3); seconds from the noise to the pixels."""

    image: np.ndarray
    seconds: float


def caption(plain: Picture, lazy: Picture) -> str:
    """What the page says below two pictures."""
    return (
        f"MAR {plain.seconds:.2f} s, LazyMAR {lazy.seconds:.2f} s: "
        f"{plain.seconds / lazy.seconds:.2f} times as fast; "
        f"PSNR {psnr(lazy.image, plain.image):.1f} dB"
    )


class SideBySide:
    """One model that draws the same seed with MAR and with LazyMAR."""

    def __init__(
        self,
        model: MAR,
        tokenizer: Tokenizer,
        latent_scale: float,
        sampling: SamplingConfig,
        dtype: torch.dtype,
    ) -> None:
        """Model and tokenizer on one device; sampling says what LazyMAR caches.

        The first pair, which would be slower, is drawn here.
        """
        self.sampler = Sampler(model, dtype)
        self.tokenizer, self.latent_scale, self.sampling = tokenizer, latent_scale, sampling
        self.pair(label=0, seed=0, num_iter=2, cfg=2.0)

    def pair(self, label: int, seed: int, num_iter: int, cfg: float) -> tuple[Picture, Picture]:
        """MAR's and LazyMAR's picture. Raises ValueError for a label, seed or number that does not fit."""
        lazy = replace(self.sampling, num_iter=num_iter, cfg=cfg)
        return self._draw(label, seed, replace(lazy, lazy_mar=None)), self._draw(label, seed, lazy)

    @torch.no_grad()
    def _draw(self, label: int, seed: int, sampling: SamplingConfig) -> Picture:
        noise = self.sampler.model.image_noise([seed])
        began = time.perf_counter()
        latents = self.sampler.sample_tokens(1, **vars(sampling), labels=[label], noise=noise)
        image = to_uint8(self.tokenizer.decode(latents.float() / self.latent_scale))[0]
        return Picture(image, time.perf_counter() - began)  # the bytes are here: the GPU is done


def page(side: SideBySide, names: tuple[str, ...] | None, start_seed: int) -> "gradio.Blocks":
    """The page; names of the classes, or None where there are only numbers."""
    import gradio

    start, class_num = side.sampling, side.sampler.model.class_num

    def enlarged(picture: Picture) -> np.ndarray:
        factor = -(-SHOWN // picture.image.shape[0])
        return picture.image.repeat(factor, 0).repeat(factor, 1)

    def sample(
        label: int | None, seed: float | None, num_iter: int, cfg: float
    ) -> tuple[np.ndarray | None, np.ndarray | None, str]:
        if label is None or seed is None:
            return None, None, "Class and seed are whole numbers from 0."
        try:
            plain, lazy = side.pair(int(label), int(seed), int(num_iter), cfg)
        except (ValueError, UserError) as error:
            return None, None, f"Cannot draw this: {error}"
        return enlarged(plain), enlarged(lazy), caption(plain, lazy)

    with gradio.Blocks(title="LazyMAR", analytics_enabled=False) as blocks:
        gradio.Markdown(
            "# MAR and LazyMAR\nThe same model and the same seed, plain and with caches."
        )
        with gradio.Row():
            if names:
                choices = [(name, label) for label, name in enumerate(names)]
                label = gradio.Dropdown(choices, value=0, label="class")
            else:
                label = gradio.Number(min(START_CLASS, class_num - 1), precision=0, label="class")
            seed = gradio.Number(start_seed, precision=0, label="seed")
            num_iter = gradio.Slider(
                1, max(MOST_STEPS, start.num_iter), start.num_iter, step=1, label="steps"
            )
            least, most = min(1, start.cfg), max(MOST_GUIDANCE, start.cfg)
            guidance = gradio.Slider(least, most, start.cfg, step=0.01, label="guidance")
        button = gradio.Button("Sample", variant="primary")
        said = gradio.Markdown()
        with gradio.Row():
            plain, lazy = (
                gradio.Image(label=name, interactive=False, format="png")
                for name in ("MAR", "LazyMAR")
            )
        button.click(sample, [label, seed, num_iter, guidance], [plain, lazy, said])
    return blocks


def parse() -> tuple[cli.Selection, int]:
    """The command line: eval.py's flags and the page's port."""
    parser = cli.make_parser("demo", __doc__.splitlines()[0])
    parser.add_flag("port", "of the page on this machine", type=int, metavar="N")
    flags = parser.parse()
    port = flags.given.pop("port", 7860)
    flags.given["lazy_mar"] = True
    return cli.select(flags, "demo"), port


def main() -> None:
    """Command line."""
    selection, port = parse()
    host = selection.host()
    if not isinstance(host, MARHost):
        raise UserError(f"the demo draws with MAR models; --model {selection.model} is not one")
    if find_spec("gradio") is None:
        raise UserError("the demo needs gradio: install it with `pip install '.[demo]'`")
    seed = selection.flags.build(EvaluationConfig, {"no_score": True}).seed
    place = cli.place(selection.flags)
    loaded = host.load(place.device)
    scale = host.tokenizer.scale(loaded.tokenizer)
    assert isinstance(loaded.model, MAR)
    side = SideBySide(loaded.model, loaded.tokenizer, scale, host.sampling, place.execution.dtype)
    names = CLASSES if host.model == "mar_tiny" and host.class_num == len(CLASSES) else None
    try:
        page(side, names, seed).launch(server_name="127.0.0.1", server_port=port)
    except OSError as error:
        raise UserError(f"--port {port} cannot be used ({error}); give another one") from error


if __name__ == "__main__":
    run_main(main)
