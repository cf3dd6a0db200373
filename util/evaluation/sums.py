"""Sums over images, from which scores are computed; sums of batches and processes can be added.

FID needs the mean and covariance of features, Inception Score the mean probabilities of each split
and the mean negative entropies. Float32 features are summed in float64, where products of two of
them are exact, so any division of the images among processes gives the same score to about 1e-9.
KID, precision and recall need the features themselves, which are kept only for them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from util.evaluation.conditions import Condition

IS_SPLITS = 10  # Salimans et al. 2016; MAR's evaluation
IS_SEED = 2020  # torch-fidelity's default seed of the shuffle before splitting

Sums = dict[str, Tensor]
# Logits (B, K) of images and their conditions -> per image, name -> whether it is right.
Judge = Callable[[Tensor, Sequence[Condition]], list[dict[str, bool]]]
_VERDICT = "verdict "


@dataclass(frozen=True)
class Gaussian:
    """Mean (d,) and unbiased covariance (d, d), float64."""

    mu: np.ndarray
    sigma: np.ndarray


class FeatureSums:
    """Sums of one process; `sums` is {name: tensor} and empty before the first image."""

    def __init__(
        self,
        num_images: int,
        layers: Mapping[str, str],
        conditions: Sequence[Condition] | None = None,
        judge: Judge | None = None,
        keep: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        """num_images: of the whole run, which decides the splits of the Inception Score.

        layers: which of the extractor's outputs is "features", "logits", "spatial". judge: compares
        logits with conditions (N,). keep: keep the features, (N, d) float32.
        """
        self.num_images, self.layers, self.keep = num_images, dict(layers), keep
        # MPS has no float64.
        self.device = torch.device("cpu" if torch.device(device).type == "mps" else device)
        self.conditions, self.judge = conditions, judge
        self.sums: Sums = {}
        self.splits = IS_SPLITS if num_images >= IS_SPLITS else 1
        self._split_of = torch.from_numpy(_splits(num_images, self.splits)).to(self.device)

    @torch.no_grad()
    def update(self, indices: Sequence[int], outputs: Mapping[str, Tensor]) -> None:
        """Add the images of these indices; outputs {layer: (B, d)} of the extractor."""
        where = torch.as_tensor(indices, device=self.device)
        for name in ("features", "spatial"):
            if name in self.layers:
                values = outputs[self.layers[name]].to(self.device).double()
                self._add(f"{name}_count", values.new_tensor([len(values)]))
                self._add(f"{name}_sum", values.sum(0))
                self._add(f"{name}_outer", values.T @ values)
        if "logits" in self.layers:
            logits = outputs[self.layers["logits"]]
            self._add_logits(where, logits.to(self.device).double())
            if self.conditions is not None and self.judge is not None:
                self._add_verdicts(logits, [self.conditions[i] for i in indices])
        if self.keep:
            values = outputs[self.layers["features"]].to(self.device, torch.float32)
            whole = self.sums.get("kept")
            if whole is None:
                whole = self.sums["kept"] = values.new_zeros(self.num_images, values.shape[1])
            whole[where] = values

    def _add_logits(self, where: Tensor, logits: Tensor) -> None:
        split = self._split_of[where]  # (B,)
        log_p = logits.log_softmax(1)
        p = log_p.exp()
        zeros = p.new_zeros(self.splits, p.shape[1])
        self._add("probabilities", zeros.index_add(0, split, p))
        self._add("negentropies", zeros[:, 0].index_add(0, split, (p * log_p).sum(1)))
        self._add("split_counts", zeros[:, 0].index_add(0, split, torch.ones_like(p[:, 0])))

    def _add_verdicts(self, logits: Tensor, conditions: Sequence[Condition]) -> None:
        assert self.judge is not None
        for verdict in self.judge(logits, conditions):
            for name, right in verdict.items():
                self._add(
                    f"{_VERDICT}{name}",
                    torch.tensor([float(right), 1.0], device=self.device).double(),
                )

    def _add(self, name: str, value: Tensor) -> None:
        if name in self.sums:
            self.sums[name] += value
        else:
            self.sums[name] = value.clone()

    def merge(self, sums: Sums) -> None:
        """Add the sums of another process, of other images."""
        for name, value in sums.items():
            self._add(name, value.to(self.device))

    def count(self) -> int:
        return int(self.sums["features_count"]) if self.sums else 0

    def gaussian(self, name: str = "features") -> Gaussian:
        """Mean and unbiased covariance of "features" or "spatial", from at least two images."""
        count = self.sums[f"{name}_count"]
        mean = self.sums[f"{name}_sum"] / count
        scatter = self.sums[f"{name}_outer"] - count * torch.outer(mean, mean)
        return Gaussian(mean.cpu().numpy(), (scatter / (count - 1)).cpu().numpy())

    def inception_score(self) -> tuple[float, float]:
        """Mean and standard deviation over the splits of exp(mean KL(p(y|x) || p(y)))."""
        counts = self.sums["split_counts"]
        q = self.sums["probabilities"] / counts[:, None]
        divergence = self.sums["negentropies"] / counts - torch.xlogy(q, q).sum(1)
        scores = divergence.exp()
        return scores.mean().item(), scores.std(correction=0).item()

    def verdicts(self) -> dict[str, float]:
        """Name -> share of the images that are right, among those to which it applies."""
        found = {k[len(_VERDICT) :]: v for k, v in self.sums.items() if k.startswith(_VERDICT)}
        return {name: (right / count).item() for name, (right, count) in found.items()}


def _splits(num_images: int, splits: int) -> np.ndarray:
    """(N,) int64: the split of each image, as torch-fidelity shuffles and cuts them."""
    order = np.random.RandomState(IS_SEED).permutation(num_images)
    found = np.empty(num_images, dtype=np.int64)
    for split in range(splits):
        found[order[split * num_images // splits : (split + 1) * num_images // splits]] = split
    return found
