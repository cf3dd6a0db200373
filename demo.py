"""MAR against LazyMAR in the browser: an image as it grows, both methods side by side, and editing.

    pip install '.[demo]'
    python demo.py                      # the bundled model
    python demo.py --model mar_huge     # an official one, after python -m util.download mar_huge vae

Flags of model, tokenizer, sampling and LazyMAR are those of eval.py; --num_iter, --cfg and --seed are the
page's first values. Serves on this machine alone.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from engine import cli
from engine.mar import SamplingConfig, mar_host
from models.mar import MAR
from models.order import OrderConfig
from models.sampler import Sampler
from models.step_view import CHANGED, NOW, PREVIOUS, REUSED, views
from models.tokenizers import Tokenizer
from util.data.datasets import center_crop, to_unit_range
from util.errors import UserError, run_main
from util.evaluation.config import EvaluationConfig
from util.images import to_uint8
from util.report import psnr
from util.shapes import CLASSES

if TYPE_CHECKING:
    import gradio

SHOWN = 384  # least pixels of a picture on the page
FRAMES = 32  # pictures of a growing image at most
START_CLASS = 207  # of ImageNet: golden retriever, the first of the README's example
MOST_STEPS, MOST_GUIDANCE = 256, 10  # ends of the sliders, unless more is asked for
UNKNOWN = 128  # grey of tokens that are not decoded yet
COLOURS = {
    NOW: (214, 69, 65),
    PREVIOUS: (240, 165, 60),
    CHANGED: (66, 113, 174),
    REUSED: (225, 225, 225),
}
LEGEND = "Tokens: red, decoded now; orange, in the previous step; blue, recomputed; grey, from the cache."


@dataclass(frozen=True)
class Request:
    """What the page asks for: one image of a class."""

    label: int
    seed: int
    num_iter: int
    cfg: float


@dataclass(frozen=True)
class Picture:
    """image uint8 (H, W, 3); seconds from the noise to the pixels."""

    image: np.ndarray
    seconds: float


@dataclass(frozen=True)
class Frame:
    """One decoding step: image uint8 (H, W, 3), grey where unknown; tokens uint8 (g, g, 3), the map."""

    image: np.ndarray
    tokens: np.ndarray
    text: str


def caption(plain: Picture, lazy: Picture) -> str:
    """The sentence below two pictures."""
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
        """Model and tokenizer on one device; sampling: LazyMAR's, with all its settings.

        The first pair, which is slower than others, is drawn here.
        """
        self.sampler = Sampler(model, dtype)
        self.tokenizer, self.latent_scale, self.sampling = tokenizer, latent_scale, sampling
        self.pair(Request(label=0, seed=0, num_iter=2, cfg=2.0))

    def pair(self, request: Request, **edit: Any) -> tuple[Picture, Picture]:
        """MAR's and LazyMAR's picture; edit: known and known_mask as in MAR.sample_tokens.

        Raises ValueError for a label, seed or number that does not fit.
        """
        lazy = self._settings(request)
        plain = replace(lazy, lazy_mar=None, head=None, order=None)
        return self._draw(request, plain, edit), self._draw(request, lazy, edit)

    @torch.no_grad()
    def edit(
        self, request: Request, image: np.ndarray, painted: np.ndarray
    ) -> tuple[Picture, Picture]:
        """Draws the painted tokens again and keeps the others.

        image uint8 (H, W, 3) of any size, cropped to a square; painted bool (H, W). Raises ValueError
        where nothing is painted.
        """
        model = self.sampler.model
        size = model.grid_size * model.patch_size * self.tokenizer.stride
        height, width = painted.shape
        side, top, left = (
            min(height, width),
            max(0, height - width) // 2,
            max(0, width - height) // 2,
        )
        square = torch.from_numpy(painted[top : top + side, left : left + side])
        cells = F.adaptive_max_pool2d(square[None].float(), model.grid_size) > 0  # (1, g, g)
        if not cells.any():
            raise ValueError("nothing is painted: paint over what should be drawn again")
        picture = Image.fromarray(image)
        if height == width and height % size == 0:
            picture = picture.reduce(height // size)  # one that this page has enlarged, exactly
        pixels = to_unit_range(center_crop(picture, size)[None].to(self.sampler.device))
        known = self.tokenizer.encode(pixels).mode() * self.latent_scale
        return self.pair(request, known=known, known_mask=~cells)

    @torch.no_grad()
    def grow(self, request: Request) -> Iterator[Frame]:
        """LazyMAR's picture after each of at most FRAMES decoding steps, beside its map of tokens."""
        model, sampling = self.sampler.model, self._settings(request)
        plan = sampling.plan(model.seq_len)
        noise = model.image_noise([request.seed]).arranged(sampling.order or OrderConfig())
        model.check_labels([request.label])
        steps = views(
            model,
            plan,
            sampling.lazy_mar,
            request.label,
            noise,
            sampling.temperature,
            sampling.head,
        )
        for i, view in enumerate(steps):
            if (len(plan.steps) - 1 - i) % -(-len(plan.steps) // FRAMES):
                continue
            image = self._pixels(view.latents)
            known = view.known.cpu().numpy()
            factor = image.shape[0] // model.grid_size
            image[~known.repeat(factor, 0).repeat(factor, 1)] = UNKNOWN
            tokens = np.array([COLOURS[state] for state in view.states], np.uint8)
            kind = "refresh" if view.refresh else "lazy"
            text = f"Step {view.step.index + 1} of {plan.num_iter} ({kind}). {LEGEND}"
            yield Frame(image, tokens.reshape(*known.shape, 3), text)

    def _settings(self, request: Request) -> SamplingConfig:
        return replace(self.sampling, num_iter=request.num_iter, cfg=request.cfg)

    @torch.no_grad()
    def _draw(self, request: Request, sampling: SamplingConfig, edit: dict[str, Any]) -> Picture:
        noise = self.sampler.model.image_noise([request.seed])
        began = time.perf_counter()
        latents = self.sampler.sample_tokens(
            1, **vars(sampling), labels=[request.label], noise=noise, **edit
        )
        image = self._pixels(latents)
        return Picture(image, time.perf_counter() - began)  # the bytes are here: the GPU is done

    def _pixels(self, latents: Tensor) -> np.ndarray:
        """Latents (1, C, h, w) -> uint8 (H, W, 3)."""
        return to_uint8(self.tokenizer.decode(latents.float() / self.latent_scale))[0]


def enlarged(picture: np.ndarray) -> np.ndarray:
    """The picture at least SHOWN pixels high."""
    factor = -(-SHOWN // picture.shape[0])
    return picture.repeat(factor, 0).repeat(factor, 1)


class Page:
    """What the buttons do."""

    def __init__(self, side: SideBySide) -> None:
        self.side = side

    def sample(self, *controls: Any) -> Iterator[tuple[Any, ...]]:
        """Controls -> MAR's and LazyMAR's picture, map of tokens, text, picture to edit; as they come."""
        try:
            request = make_request(*controls)
            for frame in self.side.grow(request):
                yield None, enlarged(frame.image), enlarged(frame.tokens), frame.text, None
            plain, lazy = self.side.pair(request)
        except (ValueError, UserError) as error:
            yield None, None, None, f"Cannot draw this: {error}", None
            return
        pictures = enlarged(plain.image), enlarged(lazy.image)
        yield *pictures, enlarged(frame.tokens), caption(plain, lazy), pictures[1]

    def edit(self, editor: dict[str, Any] | None, *controls: Any) -> tuple[Any, ...]:
        """The editor's picture and layers, controls -> MAR's and LazyMAR's picture, text."""
        try:
            if editor is None or editor["background"] is None:
                raise ValueError("there is no picture: sample or upload one first")
            image = editor["background"][:, :, :3]
            painted = np.zeros(image.shape[:2], bool)
            for layer in editor["layers"]:
                painted |= layer[:, :, 3] > 0
            plain, lazy = self.side.edit(make_request(*controls), image, painted)
        except (ValueError, UserError) as error:
            return None, None, f"Cannot draw this: {error}"
        return enlarged(plain.image), enlarged(lazy.image), caption(plain, lazy)


def make_request(label: int | None, seed: int | None, num_iter: int, cfg: float) -> Request:
    """What the controls say. Raises ValueError where one is empty."""
    if label is None or seed is None:
        raise ValueError("class and seed are whole numbers from 0")
    return Request(int(label), int(seed), int(num_iter), cfg)


def page(side: SideBySide, names: tuple[str, ...] | None, start_seed: int) -> "gradio.Blocks":
    """The page; names of the classes, or None where there are only numbers."""
    import gradio

    start, class_num = side.sampling, side.sampler.model.class_num
    actions = Page(side)

    def image(label: str) -> "gradio.Image":
        return gradio.Image(label=label, interactive=False, format="png")

    with gradio.Blocks(title="LazyMAR", analytics_enabled=False) as blocks:
        gradio.Markdown(
            "# MAR and LazyMAR\nThe same model and the same seed, plain and with caches."
        )
        with gradio.Row():
            label: gradio.components.Component
            if names:
                choices = [(name, i) for i, name in enumerate(names)]
                label = gradio.Dropdown(choices, value=0, label="class")
            else:
                label = gradio.Number(min(START_CLASS, class_num - 1), precision=0, label="class")
            seed = gradio.Number(start_seed, precision=0, label="seed")
            num_iter = gradio.Slider(
                1, max(MOST_STEPS, start.num_iter), start.num_iter, step=1, label="steps"
            )
            least, most = min(1, start.cfg), max(MOST_GUIDANCE, start.cfg)
            guidance = gradio.Slider(least, most, start.cfg, step=0.01, label="guidance")
        controls = [label, seed, num_iter, guidance]
        with gradio.Tab("Sample"):
            button = gradio.Button("Sample", variant="primary")
            said = gradio.Markdown()
            with gradio.Row():
                plain, lazy, tokens = image("MAR"), image("LazyMAR"), image("tokens computed")
        with gradio.Tab("Edit"):
            gradio.Markdown("Sample or upload a picture, paint over a part, choose a class, draw.")
            redraw = gradio.Button("Draw the painted part", variant="primary")
            answer = gradio.Markdown()
            with gradio.Row():
                editor = gradio.ImageEditor(
                    label="picture", image_mode="RGBA", type="numpy", format="png"
                )
                edited = [image("MAR, edited"), image("LazyMAR, edited")]
        button.click(actions.sample, controls, [plain, lazy, tokens, said, editor])
        redraw.click(actions.edit, [editor, *controls], [*edited, answer])
    return blocks


def parse() -> tuple[cli.Selection, int]:
    """The command line: eval.py's flags and the page's port."""
    parser = cli.make_parser("demo", __doc__.splitlines()[0])
    parser.add_flag("port", "of the page on this machine", type=int, metavar="N")
    flags = parser.parse()
    (port,) = flags.take("port")
    port = 7860 if port is None else port
    if not 0 < port < 1 << 16:
        raise UserError(f"--port is {port}; it must be from 1 to 65535")
    selection = cli.select(flags, "demo")
    flags.given["lazy_mar"] = True
    return selection, port


def main() -> None:
    """Command line."""
    selection, port = parse()
    host = mar_host(selection.host())
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
