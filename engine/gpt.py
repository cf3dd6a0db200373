"""What the families of raster autoregressive models share: sampling flags, LineAR, names of runs."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from engine.base import Family, Host, Preset
from models.gpt_images import GPTSampling
from models.line_config import LineARConfig
from models.line_methods import METHODS
from util.config import FlagParser, Flags
from util.errors import UserError


@dataclass(frozen=True)
class GPTHost(Host):
    """A named model that draws one token after another; resume: its weights."""

    model: str
    sampling: GPTSampling
    resume: str

    @property
    def steps(self) -> int | None:
        """Tokens of an image; None where only the weights say it."""
        return None

    def summary(self) -> dict[str, object]:
        return {
            "lazy_mar": False,
            "line_ar": self.sampling.line_ar is not None,
            "method": self.sampling.method,
            "num_iter": self.steps,
            "cfg": self.sampling.cfg,
        }

    def run_name(self, num_images: int) -> str:
        return self.sampling.run_name(self.model, num_images)

    def flops(self, parts: Iterable[nn.Module], layers: int, width: int, tokens: int) -> float:
        """FLOPs of one image with the full cache, without the prompt.

        parts: modules applied to every token.
        """
        branches = 2 if self.sampling.cfg > 1 else 1
        modules = (module for part in parts for module in part.modules())
        matrices = sum(m.weight.numel() for m in modules if isinstance(m, nn.Linear))
        attention = 4 * width * layers * tokens * (tokens + 1) / 2
        return float(branches * (2 * tokens * matrices + attention))


def add_sampling_flags(parser: FlagParser, family: Family, images: type) -> None:
    """The flags of the images, of sampling and of LineAR."""
    from_model = tuple({name for preset in family.presets.values() for name in preset})
    shared: dict[str, Any] = {"owner": family.name, "from_model": from_model}
    title = "LlamaGen and text-to-image"
    parser.add(images, title, **shared)
    parser.add(GPTSampling, title, **shared)
    parser.add(
        LineARConfig,
        "LineAR",
        description="--line_ar takes the defaults; each other flag changes one",
        prefix="line_",
        switch=("line_ar", "compress the key-value cache to a few lines"),
        **shared,
    )


def build_line_ar(flags: Flags, defaults: Preset) -> LineARConfig | None:
    """LineAR's settings, None without --line_ar. UserError for a flag that the method ignores."""
    name = flags.value("line_method", "linear")
    method = METHODS.get(name)
    if flags.value("line_ar") and method is not None:
        for setting_name in ("anchors", "recent", "pooling", "spaced"):
            flag = f"line_{setting_name}"
            if setting_name not in method.settings:
                if flag in flags.given:
                    raise UserError(f"--{flag} has no effect with --line_method {name}: remove it")
                defaults = {k: v for k, v in defaults.items() if k != flag}
    return flags.build_optional(LineARConfig, "line_ar", "LineAR", defaults, prefix="line_")
