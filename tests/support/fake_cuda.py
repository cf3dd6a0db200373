"""A CUDA device that computes shapes, dtypes and devices, but no numbers, and never waits.

Tensors on "cuda" are torch's fake tensors; tensors on the CPU are real ones, so what a program decides
there is decided as always. What would go wrong on a card, or cost time there, is an error here: tensors
on two devices in one operation, and whatever needs a number from the device (item, tolist, nonzero,
boolean masks). Needs no card and no driver.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

COPIES = ("copy_", "_to_copy")
WAITS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select")
WAITS += ("unique_consecutive",)


class FakeCuda(TorchDispatchMode):
    """The device; enter it by `fake_cuda`.

    operations: names of those on the device so far. answers: what the next
    numbers read from the device are; reading more is an error. in_loop: nothing may come from the CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[float | bool] = []
        self.in_loop = False
        self.operations: list[str] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        flat = tree_flatten((args, kwargs))[0]
        tensors = [value for value in flat if isinstance(value, Tensor)]
        on_device = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        name = func.overloadpacket.__name__
        if name == "_pin_memory":
            return args[0]
        if not on_device and torch.device(kwargs.get("device") or "cpu").type != "cuda":
            kwargs.pop("pin_memory", None)
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if name in WAITS and any(tensor.device.type == "cuda" for tensor in tensors):
            if not self.answers:
                raise RuntimeError(f"{name} waits for the device")
            return self.answers.pop(0)
        # A scalar is an argument of its kernel, but a copy of it is a transfer.
        host = [t for t in tensors if t.device.type == "cpu" and (t.dim() or name in COPIES)]
        if self.in_loop and host:
            raise RuntimeError(f"{name} takes a tensor from the CPU inside the loop")
        if isinstance(kwargs.get("generator"), torch.Generator):
            kwargs["generator"] = None
        self.operations.append(name)
        return func(*args, **kwargs)

    @contextmanager
    def loop(self) -> Iterator[None]:
        """Inside, the program may neither wait for the device nor take anything from the CPU."""
        assert not self.answers
        self.in_loop = True
        try:
            yield
        finally:
            self.in_loop = False


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kwargs: object,
) -> Tensor:
    """One operation, as on a card; without one torch would take it apart."""
    del dropout_p, is_causal, kwargs
    for other in (k, v) if attn_mask is None else (k, v, attn_mask):
        if (other.dtype, other.device) != (q.dtype, q.device):
            raise RuntimeError(f"attention of {q.dtype}, {q.device}, {other.dtype}, {other.device}")
    assert k.shape == v.shape and k.shape[-1] == q.shape[-1]
    return torch.add(q, 0.0)


def _apply(
    module: nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True
) -> nn.Module:
    """nn.Module._apply, which cannot turn real parameters into fake ones."""
    for child in module.children() if recurse else ():
        _apply(child, convert)
    for held in (module._parameters, module._buffers):
        for name, tensor in held.items():
            if tensor is not None:
                moved = convert(tensor.detach())
                is_parameter = isinstance(tensor, nn.Parameter)
                held[name] = nn.Parameter(moved, tensor.requires_grad) if is_parameter else moved
    return module


def _backward(loss: Tensor, *args: object, **kwargs: object) -> None:
    """Gradients of zero for all that the loss depends on: torch's engine would ask the driver."""
    assert loss.dim() == 0
    assert loss.grad_fn is not None
    waiting, seen = [loss.grad_fn], {None}
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            zeros = torch.zeros_like(node.variable)
            before = node.variable.grad
            node.variable.grad = zeros if before is None else before.add_(zeros)
        fresh = [function for function, _ in node.next_functions if function not in seen]
        seen.update(fresh)
        waiting += fresh


class FakeEvent:
    """Stands in for torch.cuda.Event."""

    def record(self) -> None:
        """Nothing to do."""

    synchronize = record


class FakeGenerator(torch.Generator):
    """A generator of any device; what is drawn are no numbers."""

    def __new__(cls, device: object = "cpu") -> "FakeGenerator":
        del device
        return super().__new__(cls)


@contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """Inside, "cuda" is a fake device, and autocast and GradScaler believe in it."""
    with (
        mock.patch("torch.cuda.device", lambda device: nullcontext()),
        mock.patch("torch.cuda.Event", FakeEvent),
        mock.patch("torch.cuda.is_bf16_supported", lambda: True),
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        mock.patch("torch.Generator", FakeGenerator),
        mock.patch("torch.nn.functional.scaled_dot_product_attention", _attention),
        mock.patch("torch.nn.Module._apply", _apply),
        mock.patch("torch.Tensor.backward", _backward),
        FakeTensorMode(allow_non_fake_inputs=True),
        FakeCuda() as device,
    ):
        yield device
