"""The counts of a compressed key-value cache, all known before the first token."""

from dataclasses import dataclass

CONDITION = 1  # positions in front of the image: the class token


@dataclass(frozen=True)
class LinePlan:
    """Every count of a run, in image tokens except for `condition`.

    line, lines: the grid. budget: tokens kept when a line begins. anchors, recent: the first and
    the newest ones, never evicted; `budget - anchors - recent` others are kept by their score.
    spaced: tokens of every older line among them that are never evicted either.
    """

    line: int
    lines: int
    budget: int
    anchors: int
    recent: int
    condition: int = CONDITION
    spaced: int = 0

    @property
    def compressed(self) -> bool:
        """Whether tokens are evicted."""
        return self.budget < self.line * self.lines

    @property
    def slots(self) -> int:
        """Slots of the buffer per head; the last token of the image needs none."""
        tokens = self.line * self.lines - 1
        return self.condition + min(tokens, self.budget + self.line)

    def live(self, position: int) -> int:
        """Slots in use when this position, counted with the condition, is about to be appended."""
        tokens = position - self.condition
        if not self.compressed or tokens < self.budget + self.line:
            return position
        return self.condition + self.budget + (tokens - self.budget) % self.line
