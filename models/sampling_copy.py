"""A copy of a model for sampling: matrix products in one dtype, weights in the processor's layout.

It shares all unchanged weights with the model, has the same modules and forward methods, and cannot be
trained. Under autocast a linear layer casts its weight at each call, and on CPUs oneDNN changes its
layout; here both are done once.
"""

import copy
import platform
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Smaller float32 weights are not worth packing: a call costs 10 us more (measured, 32^2 to 768^2).
PACKED_FROM = 384**2
# On AVX-512 processors that are not Intel's, MKL, which F.linear calls, is 2.3 times slower than oneDNN.
# oneDNN wins from this many multiply-adds per call (measured on a Zen 5, 32^2 to 1024^2, 1 to 8192 rows).
MULTIPLY_ADDS_FROM = 2**19

Model = TypeVar("Model", bound=nn.Module)


class CastLinear(nn.Module):
    """x W^T + b in `dtype`, whatever the dtype of x; called as models.layers.Linear is."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
        """weight (out, in), bias (out,)."""
        super().__init__()
        self.register_buffer("weight", weight.detach().to(dtype))
        self.register_buffer("bias", bias.detach().to(dtype))

    def forward(self, x: Tensor, outputs: slice | None = None) -> Tensor:
        """x (..., in) -> (..., out), or those outputs alone."""
        weight, bias = self.weight, self.bias
        if outputs is not None:
            weight, bias = weight[outputs], bias[outputs]
        return F.linear(x.to(weight.dtype), weight, bias)


class PackedLinear(nn.Module):
    """CastLinear with weights in oneDNN's own layout; each slice of outputs is laid out once."""

    def __init__(
        self, weight: Tensor, bias: Tensor, dtype: torch.dtype, least_work: int = 0
    ) -> None:
        """weight (out, in), bias (out,); kept as they are, for slices of them.

        least_work: calls of fewer multiply-adds are CastLinear's.
        """
        super().__init__()
        self.weight, self.bias, self.dtype = weight.detach(), bias.detach(), dtype
        self.least_work = least_work
        self._packed: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def forward(self, x: Tensor, outputs: slice | None = None) -> Tensor:
        """x (..., in) -> (..., out), or those outputs alone."""
        start, stop, _ = (outputs or slice(None)).indices(len(self.weight))
        if x.numel() * (stop - start) < self.least_work:
            weight, bias = self.weight[start:stop].to(self.dtype), self.bias[start:stop]
            return F.linear(x.to(self.dtype), weight, bias.to(self.dtype))
        if (start, stop) not in self._packed:
            weight = self.weight[start:stop].to(self.dtype).contiguous()
            # Laid out for 64 rows: measured best from 2 to 64 rows, and no worse above.
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, 64)
            self._packed[start, stop] = packed, self.bias[start:stop].to(self.dtype)
        packed, bias = self._packed[start, stop]
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), packed, bias, "none", [], "")


def sampling_linear(
    weight: Tensor, bias: Tensor, dtype: torch.dtype, pack: bool = True
) -> nn.Module:
    """The faster one on this device; pack: False excludes PackedLinear. weight (out, in), bias (out,)."""
    if not (pack and weight.device.type == "cpu" and _onednn_packs(dtype)):
        return CastLinear(weight, bias, dtype)
    if dtype == torch.float32 and mkl_lacks_avx512():
        return PackedLinear(weight, bias, dtype, MULTIPLY_ADDS_FROM)
    small = dtype == torch.float32 and weight.numel() < PACKED_FROM
    return (CastLinear if small else PackedLinear)(weight, bias, dtype)


def _onednn_packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN has a layout of its own here (the products are those of torch.compile)."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float32:
        return True
    return dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@cache
def mkl_lacks_avx512() -> bool:
    """Whether this processor has AVX-512 and is not Intel's, as far as Linux says."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "GenuineIntel" not in text and torch.backends.cpu.get_cpu_capability() == "AVX512"


def sampling_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of autocast if it is on, else that of the weights."""
    weight = next(model.parameters())
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


def sampling_copy(model: Model, dtype: torch.dtype, whole: nn.Module, pack: bool = True) -> Model:
    """A copy of `model`: its linear layers, and all of submodule `whole`, are in `dtype`.

    Elsewhere sums, norms and tables keep the dtype of the model, as under autocast.
    pack: False for torch.compile, which cannot trace packed weights.
    """
    inside = {id(p) for p in whole.parameters()}
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        value = parameter.detach()
        value = value.to(dtype) if id(parameter) in inside else value
        memo[id(parameter)] = nn.Parameter(value, requires_grad=False)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            memo[id(module)] = sampling_linear(module.weight, module.bias, dtype, pack)
    return copy.deepcopy(model, memo).eval()
