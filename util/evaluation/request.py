"""What somebody wants to know of images: which metrics, by which extractor, against which reference."""

import os
from dataclasses import dataclass
from pathlib import Path

from util.files import sha256_of

METRICS = ("fid", "isc", "sfid", "kid", "pr")  # pr: precision and recall
# One of the results of each.
RESULT_OF = {"fid": "fid", "isc": "is_mean", "sfid": "sfid", "kid": "kid_mean", "pr": "precision"}
SCORES = (
    *("fid", "is_mean", "is_std", "is_splits", "accuracy", "sfid"),
    *("kid_mean", "kid_std", "kid_subset", "precision", "recall", "reference"),
)  # the names of their results


@dataclass(frozen=True)
class ScoreRequest:
    """features: name of the extractor; features_path: its weights; stats_path: the reference's npz."""

    features: str
    features_path: str | None
    stats_path: str | os.PathLike
    metrics: tuple[str, ...] = ("fid", "isc")

    @property
    def needs_features(self) -> bool:
        """Whether sums do not suffice."""
        return not {"kid", "pr"}.isdisjoint(self.metrics)

    @property
    def reference(self) -> str:
        """What the scores are relative to: extractor, file and first digits of its sha256."""
        path = Path(self.stats_path)
        return f"{self.features} {path.name} {sha256_of(path)[:16]}"
