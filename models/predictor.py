"""PlainPredictor: z of each decoding step, computed in full."""

from torch import Tensor

from models.plan import DecodingStep
from models.transformer import MaskedTransformer


class PlainPredictor:
    """Born with one batch."""

    def __init__(self, model: MaskedTransformer, order: Tensor, embedding: Tensor) -> None:
        """order (B, L) decoding order; embedding (B, D), or (2B, D) with guidance."""
        self.model = model
        self.branches = embedding.shape[0] // order.shape[0]
        self.order = order.repeat(self.branches, 1)
        self.embedding = embedding

    def __call__(self, step: DecodingStep, tokens: Tensor) -> Tensor:
        """Tokens (B, L, c), known up to step.start -> z (branches * B, stop - start, D)."""
        known = tokens[:, : step.start].repeat(self.branches, 1, 1)
        return self.model.predict(known, self.order, step.stop, self.embedding)
