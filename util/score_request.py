"""What somebody wants to know of images: which metrics, by which extractor, against which reference."""

import os
from dataclasses import dataclass

METRICS = ("fid", "isc", "sfid", "kid", "pr")  # pr: precision and recall


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
