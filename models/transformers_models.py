"""What the sampling loops over models of transformers share: steps through a cache, and weights."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from models.line_config import LineARConfig
from models.transformers_cache import LineARCache, cache_argument


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


def load_parts(
    model: PreTrainedModel, weights: Mapping[str, Tensor], absent: tuple[str, ...]
) -> None:
    """Give a model its weights, all but those of the parts `absent`, beginnings of their names.

    ValueError if a tensor is missing, unknown or of another shape.
    """
    expected = model.state_dict()
    missing = [k for k in expected if k not in weights and not k.startswith(absent)]
    unknown = [k for k in weights if k not in expected]
    shapes = [k for k in weights if k in expected and weights[k].shape != expected[k].shape]
    if misfits := missing + unknown + shapes:
        raise ValueError(
            f"the weights do not fit this {type(model).__name__}: {len(missing)} tensors are missing, "
            f"{len(unknown)} unknown, {len(shapes)} of another shape, the first is {misfits[0]}"
        )
    model.load_state_dict(weights, strict=False)
