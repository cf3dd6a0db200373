"""What several test modules share. ROOT is the folder of the repository."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "pretrained_models/*/README.md")
    for path in ROOT.glob(pattern)
)
