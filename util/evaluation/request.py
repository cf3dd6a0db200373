"""Which metrics to compute, with which feature extractor and reference."""

import os
from dataclasses import dataclass
from pathlib import Path

from util.config import setting
from util.files import sha256_of

METRICS = ("fid", "isc", "sfid", "kid", "pr")  # pr: precision and recall
# One of the results of each.
RESULT_OF = {"fid": "fid", "isc": "is_mean", "sfid": "sfid", "kid": "kid_mean", "pr": "precision"}
SCORES = (
    *("fid", "is_mean", "is_std", "is_splits", "accuracy", "sfid"),
    *("kid_mean", "kid_std", "kid_subset", "precision", "recall", "reference"),
    *("agreement_shape", "agreement_colour", "agreement_ground", "agreement_relation"),
)  # the names of their results


def parse_metrics(text: str) -> tuple[str, ...]:
    """Names of metrics: fid,pr is ("fid", "pr")."""
    names = tuple(dict.fromkeys(text.split(",")))
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not a metric; use {', '.join(METRICS)}")
    return names


@dataclass(frozen=True)
class ScoreRequest:
    """features: name of the extractor; features_path: its weights; stats_path: the reference's npz."""

    features: str = setting("inception-v3-compat", "extractor for FID and IS", metavar="NAME")
    features_path: str | None = setting(None, "weights of the extractor", metavar="FILE")
    stats_path: str | os.PathLike = setting(
        "fid_stats/adm_in256_stats.npz",
        "npz with mu and sigma of the reference images",
        flag="fid_stats",
        metavar="FILE",
    )
    metrics: tuple[str, ...] = setting(
        ("fid", "isc"), f"any of {', '.join(METRICS)}", parse=parse_metrics, metavar="NAME,..."
    )

    @property
    def needs_features(self) -> bool:
        """Whether a metric needs the features themselves, not only sums."""
        return not {"kid", "pr"}.isdisjoint(self.metrics)

    @property
    def reference(self) -> str:
        """Extractor, reference file and first digits of its sha256."""
        path = Path(self.stats_path)
        return f"{self.features} {path.name} {sha256_of(path)[:16]}"
