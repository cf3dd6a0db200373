"""What the sampling loops over models of transformers share: steps through a cache, and weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from models.line_config import LineARConfig
from models.transformers_cache import LineARCache, cache_argument
from util.files import read_json

Model = TypeVar("Model", bound=PreTrainedModel)


def new_cache(line_ar: LineARConfig | bool | None, grid: tuple[int, int]) -> Cache:
    """A compressed cache, or the library's own full one for None."""
    return DynamicCache() if line_ar is None else LineARCache(line_ar, grid)


class Decoder:
    """A language model of transformers and the cache of one sampling loop, fed call by call."""

    def __init__(
        self, model: PreTrainedModel, cache: Cache, attention_mask: Tensor | None = None
    ) -> None:
        """attention_mask: (rows, P), zero for padding.

        Without padding the model gets no mask, so that no step has to look at one. Padding
        takes up positions, as in the library's Janus: what counts is their distance.
        """
        self.model, self.cache = model, cache
        self.argument = cache_argument(model)
        self.mask: Tensor | None = None
        if attention_mask is not None and not bool(attention_mask.all()):
            self.mask = attention_mask.long()

    def __call__(self, **inputs: Tensor) -> Tensor:
        """input_ids or inputs_embeds of the next tokens -> hidden state (rows, D) behind the last one."""
        if self.mask is not None:
            if self.cache.get_seq_length():
                self.mask = F.pad(self.mask, (0, 1), value=1)
            inputs["attention_mask"] = self.mask
        output = self.model(**inputs, use_cache=True, **{self.argument: self.cache})
        return output.last_hidden_state[:, -1]


def with_weights(
    kind: type[Model],
    config: PreTrainedConfig,
    weights: Mapping[str, Tensor],
    absent: tuple[str, ...],
) -> Model:
    """A model in float32 with these weights, all but those of the parts `absent`, beginnings of names.

    ValueError if a tensor is missing, unknown or of another shape.
    """
    return _load(kind, None, absent, True, config=config, state_dict=dict(weights))


def from_folder(kind: type[Model], folder: Path, absent: tuple[str, ...] = ()) -> Model:
    """A model in float32 of a folder that save_pretrained wrote; it may hold other tensors, too.

    ValueError if a tensor is missing or of another shape, or the folder is of another kind of model.
    """
    config, wanted = check_kind(kind, folder), cast(Any, kind.config_class)
    for part in wanted.sub_configs:  # the library's default for one has billions of weights
        if not isinstance(config.get(part), dict):
            raise ValueError(f"its config.json has no {part}")
    return _load(kind, folder, absent, False, use_safetensors=True)


def check_kind(kind: type[PreTrainedModel], folder: Path) -> dict[str, Any]:
    """Its config.json. ValueError for another kind of model, of which the library would only warn."""
    config = read_json(folder / "config.json", dict, "download it again")
    wanted: Any = kind.config_class
    if (found := config.get("model_type")) != wanted.model_type:
        raise ValueError(f"its model_type is {found!r}, not {wanted.model_type!r}")
    return config


def _load(
    kind: type[Model],
    source: Path | None,
    absent: tuple[str, ...],
    refuse_unknown: bool,
    **options: Any,
) -> Model:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the library reports each tensor that is absent
    try:
        loaded: Any = kind.from_pretrained(
            source,
            **options,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report, too
        )
    finally:
        logging.set_verbosity(verbosity)
    model: Model
    report: dict[str, Any]
    model, report = loaded
    missing = sorted(key for key in report["missing_keys"] if not key.startswith(absent))
    unknown = sorted(report["unexpected_keys"]) if refuse_unknown else []
    shapes = sorted(key for key, *_ in report["mismatched_keys"])
    if misfits := missing + unknown + shapes:
        raise ValueError(
            f"the weights do not fit this {kind.__name__}: {len(missing)} tensors are missing, "
            f"{len(unknown)} unknown, {len(shapes)} of another shape, the first is {misfits[0]}"
        )
    return model.eval()
