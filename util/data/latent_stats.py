"""Mean and deviation of each latent channel: l-DeTok's pickle, and the safetensors made of it.

l-DeTok pickles dict(KEY -> {"single": ..., "channel": (mean, std)}) of torch tensors, with 2C channel
entries: those of the means, then those of the log variances. Ours is a safetensors file with the
first C as `mean` (C,) and `std` (C,), float32.
"""

import io
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from util.errors import WeightsError
from util.weights import read_safetensors, save_safetensors


def read_statistics(path: str | Path) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,), float32, of a file that `convert_statistics` wrote."""
    path = Path(path)
    if not path.is_file():
        raise WeightsError(
            f"there are no latent statistics at {path}: `python -m util.download detok_tokenizer` "
            f"fetches stats.pkl, `python -m util.checkpoint convert stats.pkl {path}` converts it"
        )
    if path.suffix != ".safetensors":
        raise WeightsError(
            f"{path} is not a safetensors file: convert it with "
            f"`python -m util.checkpoint convert {path} {path.with_suffix('.safetensors')}`"
        )
    tensors, _ = read_safetensors(path)
    if tensors.keys() != {"mean", "std"}:
        raise WeightsError(f"{path} holds {', '.join(tensors) or 'nothing'}, not mean and std")
    return _checked(tensors["mean"], tensors["std"], path)


def convert_statistics(
    source: str | Path, target: str | Path, key: str | None = None, overwrite: bool = False
) -> Path:
    """Write the channel statistics of l-DeTok's pickle as `target` (*.safetensors).

    key: which statistics, where the file holds several. WeightsError for a foreign or damaged pickle,
    an unknown key, statistics that are not finite or not positive, or a file that exists.
    """
    source, target = Path(source), Path(target)
    if target.suffix != ".safetensors":
        raise WeightsError(f"{target} must end in .safetensors")
    if target.exists() and not overwrite:
        raise WeightsError(f"{target} exists: choose another name, or replace it by --overwrite")
    found = _read_pickle(source)
    if not isinstance(found, Mapping) or not found:
        raise WeightsError(f"{source} holds no latent statistics by name")
    names = ", ".join(map(str, found))
    if key is None and len(found) > 1:
        raise WeightsError(f"{source} holds statistics of {names}: choose one by --key")
    key = next(iter(found)) if key is None else key
    if key not in found:
        raise WeightsError(f"{source} has no statistics '{key}': choose from {names}")
    mean, std = _channels(found[key], f"'{key}' in {source}")
    save_safetensors(target, {"mean": mean, "std": std}, {"statistics": str(key)})
    return target


def _channels(entry: object, source: str) -> tuple[Tensor, Tensor]:
    """The first C of 2C entries of {"channel": (mean, std)}."""
    pair = entry.get("channel") if isinstance(entry, Mapping) else None
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise WeightsError(f"{source} has no pair of mean and std as 'channel'")
    for tensor in pair:
        if not isinstance(tensor, Tensor) or tensor.dim() != 1 or len(tensor) % 2:
            raise WeightsError(
                f"the 'channel' statistics of {source} are not tensors of 2C entries, C of the means "
                "and C of the log variances"
            )
    mean, std = (tensor[: len(tensor) // 2] for tensor in pair)
    return _checked(mean, std, source)


def _checked(mean: Tensor, std: Tensor, source: object) -> tuple[Tensor, Tensor]:
    mean, std = mean.detach().float(), std.detach().float()
    if mean.dim() != 1 or mean.shape != std.shape or not len(mean):
        shapes = f"{tuple(mean.shape)} and {tuple(std.shape)}"
        raise WeightsError(f"mean and std of {source} are {shapes}; both must be (C,)")
    if not (bool(mean.isfinite().all()) and bool(std.isfinite().all()) and bool((std > 0).all())):
        raise WeightsError(f"{source}: the statistics are not finite, or a std is not positive")
    return mean, std


class _TensorUnpickler(pickle.Unpickler):
    """Builds tensors and plain containers; any other name in the file is refused."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
            ("torch.storage", "_load_from_bytes"): _load_storage,
        }
        if (module, name) not in allowed:
            raise _RefusedError(f"{module}.{name}")
        return allowed[module, name]


class _RefusedError(Exception):
    """A name that statistics do not need."""


def _load_storage(data: bytes) -> Any:
    """torch's function of this name, on the CPU and with weights_only."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _read_pickle(path: Path) -> object:
    if not path.is_file():
        raise WeightsError(f"there are no latent statistics at {path}")
    try:
        with path.open("rb") as file:
            return _TensorUnpickler(file).load()
    except _RefusedError as error:
        raise WeightsError(
            f"{path} holds {error}, which statistics do not need, and was not read: it is another file"
        ) from error
    except Exception as error:  # a damaged pickle raises almost anything
        raise WeightsError(f"{path} is damaged or no pickle of latent statistics") from error
