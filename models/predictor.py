"""PlainPredictor: z of each decoding step, computed in full."""

from typing import Protocol

from torch import Tensor

from models.plan import DecodingStep
from models.transformer import MaskedTransformer


class Predictor(Protocol):
    """Computes z of the tokens of a decoding step.

    first_fills: the first step is computed even where z follows from the class alone.
    """

    first_fills: bool

    def __call__(self, step: DecodingStep, tokens: Tensor) -> Tensor:
        """Tokens (B, L, c), known up to step.start -> z (R, stop - start, D); unguided (B, ., D)."""


class PlainPredictor:
    """Rows are conditional first, then with guidance unconditional."""

    first_fills = False

    def __init__(self, model: MaskedTransformer, order: Tensor, embedding: Tensor) -> None:
        """order (R, L) decoding order; embedding (R, D)."""
        self.model = model
        self.order = order
        self.embedding = embedding

    def __call__(self, step: DecodingStep, tokens: Tensor) -> Tensor:
        """Tokens (B, L, c), known up to step.start -> z (R, stop - start, D); unguided (B, ., D)."""
        rows = len(self.order) if step.guided else len(tokens)
        known = tokens[:, : step.start].repeat(rows // len(tokens), 1, 1)
        return self.model.predict(known, self.order[:rows], step.stop, self.embedding[:rows])
