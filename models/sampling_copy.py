"""A copy of a model to sample with: products in one dtype, weights laid out for the processor.

It shares with the model whatever needs no change, has the same modules and the same forward
methods, and cannot be trained. Under autocast a linear layer casts its weight, and on CPUs oneDNN
lays it out anew, at each call; here both are done once.
"""

import copy
import platform
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# float32 weights below this are not worth it: a call costs 10 us more (measured from 32^2 to 768^2).
PACKED_FROM = 384**2


class SamplingLinear(nn.Module):
    """x W^T + b in `dtype`, whatever the dtype of x; called as models.layers.Linear is."""

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
        """weight (out, in), bias (out,)."""
        super().__init__()
        self.weight, self.bias, self.dtype = weight.detach(), bias.detach(), dtype
        self._products: dict[tuple[int, int], Callable[[Tensor], Tensor]] = {}

    def forward(self, x: Tensor, outputs: slice | None = None) -> Tensor:
        """x (..., in) -> (..., out), or those outputs alone."""
        start, stop, _ = (outputs or slice(None)).indices(self.weight.shape[0])
        if (start, stop) not in self._products:
            weight, bias = self.weight[start:stop], self.bias[start:stop]
            self._products[start, stop] = product(weight.to(self.dtype), bias.to(self.dtype))
        return self._products[start, stop](x.to(self.dtype))


def product(weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    """x -> x W^T + b for weight (out, in), bias (out,) and x (..., in) of one dtype."""
    if not _onednn_packs(weight):
        return lambda x: F.linear(x, weight, bias)
    # Laid out for 64 rows: measured best from 2 to 64 rows, and no worse above.
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 64)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def _onednn_packs(weight: Tensor) -> bool:
    """Whether oneDNN's own layout exists and wins here (the products are those of torch.compile)."""
    if weight.device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.float32:
        return weight.numel() >= PACKED_FROM
    return weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def sampling_dtype(model: nn.Module) -> torch.dtype:
    """That of autocast, where it is on; else that of the weights."""
    weight = next(model.parameters())
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


def sampling_copy(model: nn.Module, dtype: torch.dtype, whole: nn.Module) -> nn.Module:
    """The copy of `model`, its linear layers in `dtype`; of its part `whole`, everything is.

    Elsewhere sums, norms and tables keep the dtype of the model: what autocast does, too.
    """
    inside = {id(p) for p in whole.parameters()}
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        value = parameter.detach()
        value = value.to(dtype) if id(parameter) in inside else value
        memo[id(parameter)] = nn.Parameter(value, requires_grad=False)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            memo[id(module)] = SamplingLinear(module.weight, module.bias, dtype)
    return copy.deepcopy(model, memo).eval()
