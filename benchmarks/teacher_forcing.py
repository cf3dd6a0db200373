"""A sampling run in which real tokens take the place of sampled ones, plain and with LazyMAR.

Every method sees the same known tokens at every step, so what differs is its own error of this step,
not what earlier errors have made of the image. `Teacher` keeps MAR's z and denoising paths of some
images; `Teacher.compare` runs a LazyMARConfig beside them, with the cache history it would have.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measures import path_kl, path_kl_weights, relative_error
from diffusion import DIFFUSION_STEPS
from diffusion.gaussian import EpsilonModel, GaussianDiffusion
from diffusion.schedule import cosine_betas
from models.denoiser import Denoiser, PlainDenoiser
from models.head_config import DenoisingRun
from models.lazy_head import LazyDenoiser
from models.lazy_mar import LazyMARConfig
from models.lazy_predictor import LazyPredictor
from models.mar import MAR
from models.plan import DecodingPlan
from models.predictor import PlainPredictor, Predictor


class Recording(GaussianDiffusion):
    """`sample` returns what a run meets, in the order of the run: (2, n, T, C), states and epsilons."""

    def __init__(self, like: GaussianDiffusion) -> None:
        super().__init__(cosine_betas(DIFFUSION_STEPS), like.timestep_map)

    def sample(self, model: EpsilonModel, noise: Tensor, temperature: float = 1.0) -> Tensor:
        """noise (n, T+1, C) as in GaussianDiffusion.sample."""
        met: list[Tensor] = []

        def watched(i: int, x: Tensor) -> tuple[Tensor, Tensor]:
            epsilon, fraction = model(i, x)
            met.append(torch.stack([x, epsilon]))
            return epsilon, fraction

        super().sample(watched, noise, temperature)
        return torch.stack(met, dim=2)


class Replay(Recording):
    """`sample` returns the epsilons (n, T, C) of a model at given states, step after step."""

    def sample(self, model: EpsilonModel, noise: Tensor, temperature: float = 1.0) -> Tensor:
        """noise: the states (n, T, C) of a Recording, and one more, which is not read."""
        steps = reversed(range(self.num_timesteps))
        return torch.stack([model(i, noise[:, k])[0] for k, i in enumerate(steps)], dim=1)


def denoiser_of(model: MAR, config: LazyMARConfig | None, diffusion: GaussianDiffusion) -> Denoiser:
    """The head of MAR, or that of LazyMAR, over a diffusion process of the model's steps."""
    steps = diffusion.num_timesteps
    runs = [DenoisingRun(diffusion, (True,) * steps)]
    if config is not None and config.head_cache:
        return LazyDenoiser(model.diffloss.net, runs, config, steps)
    return PlainDenoiser(model.diffloss.net, runs)


@dataclass(frozen=True)
class ForcedImages:
    """Real images as a run meets them, in decoding order: order (B, L), tokens (B, L, c), head noise
    (B, L, T+1, c), and labels."""

    order: Tensor
    tokens: Tensor
    head: Tensor
    labels: list[int]

    @classmethod
    def create(
        cls, model: MAR, latents: Tensor, labels: Sequence[int], seeds: Sequence[int]
    ) -> "ForcedImages":
        """latents (B, C, H, W) on the model's scale; seeds decide orders and head noise."""
        noise = model.image_noise(seeds)
        order = noise.orders.flip(1)  # their front comes last
        tokens = model.patchify(latents.to(order.device))
        tokens = tokens.gather(1, order[:, :, None].expand_as(tokens))
        head = noise.head.gather(1, order[:, :, None, None].expand_as(noise.head))
        return cls(order, tokens, head, list(labels))


def forced_z(
    model: MAR, plan: DecodingPlan, images: ForcedImages, config: LazyMARConfig | None
) -> Iterator[Tensor]:
    """z (R, n, D) of the tokens of each step, given the real tokens decoded before.

    Rows are conditional, then with guidance unconditional. A config of None is MAR.
    """
    count = len(images.labels)
    embeddings = [model.class_embedding(images.labels, count)]
    if plan.guided:
        embeddings.append(model.class_embedding(None, count))
    order, embedding = images.order.repeat(len(embeddings), 1), torch.cat(embeddings)
    predictor: Predictor = PlainPredictor(model, order, embedding)
    if config is not None:
        predictor = LazyPredictor(model, order, embedding, plan, config)
    for step in plan.steps:
        yield predictor(step, images.tokens)


@dataclass(frozen=True)
class Differences:
    """One LazyMARConfig beside MAR. S steps, N images of which M have paths, T denoising steps.

    z_error (N, S), z_error_unconditional (N, S): relative squared error of z of the tokens decoded.
    kl (M, S, T): nats per token of the step, by denoising step in the order of a run.
    """

    z_error: Tensor
    z_error_unconditional: Tensor | None
    kl: Tensor


class Teacher:
    """MAR on real images: z of every step, and for the first batches the paths of all tokens."""

    @torch.no_grad()
    def __init__(
        self, model: MAR, plan: DecodingPlan, batches: Sequence[ForcedImages], with_paths: int
    ) -> None:
        """model: a sampling copy. with_paths: the number of batches whose paths are kept."""
        self.model, self.plan, self.batches = model, plan, batches
        self.z = [list(forced_z(model, plan, images, None)) for images in batches]
        counts = [step.stop - step.start for step in plan.steps]
        self.share = torch.tensor(counts, dtype=torch.float64) / plan.seq_len  # of tokens, by step
        self.diffusion = model.diffloss.gen_diffusion
        record = denoiser_of(model, None, Recording(self.diffusion))
        self.paths: list[list[Tensor]] = []  # of a batch and a step (2, B * n, T, c)
        for images, conditions in list(zip(batches, self.z, strict=True))[:with_paths]:
            noise = [images.head[:, step.start : step.stop].flatten(0, 1) for step in plan.steps]
            self.paths.append(list(self._denoise(record, conditions, noise)))

    def _denoise(
        self, denoiser: Denoiser, conditions: Sequence[Tensor], inputs: Sequence[Tensor]
    ) -> Iterator[Tensor]:
        """What the denoiser returns at each step; conditions (R, n, D), inputs (B * n, ., c)."""
        for step, z, given in zip(self.plan.steps, conditions, inputs, strict=True):
            rows = z.flatten(0, 1)
            rows = rows[: len(given)] if step.cfg == 1.0 else rows
            yield denoiser(rows, given, step.cfg, 1.0)

    @torch.no_grad()
    def compare(self, config: LazyMARConfig) -> Differences:
        """A LazyMARConfig beside MAR."""
        replay = denoiser_of(self.model, config, Replay(self.diffusion))
        weights = path_kl_weights(self.diffusion).to(self.model.fake_latent.device)
        errors, kl = [], []
        for number, images in enumerate(self.batches):
            exact = self.z[number]
            conditions = exact
            if config.token_cache or config.condition_cache:
                conditions = list(forced_z(self.model, self.plan, images, config))
            count = len(images.labels)
            pairs = list(zip(conditions, exact, strict=True))
            branches = [slice(0, count), slice(count, None)][: 1 + self.plan.guided]
            errors.append(
                [torch.stack([relative_error(a[r], b[r]) for a, b in pairs], 1) for r in branches]
            )
            if number >= len(self.paths):
                continue
            states = [F.pad(path[0], (0, 0, 0, 1)) for path in self.paths[number]]
            found = self._denoise(replay, conditions, states)
            nats = [
                path_kl(weights, path[1], other).unflatten(0, (count, -1)).mean(1)
                for path, other in zip(self.paths[number], found, strict=True)
            ]  # by step (B, T)
            kl.append(torch.stack(nats, 1))
        conditional, *unconditional = (torch.cat(x).cpu() for x in zip(*errors, strict=True))
        return Differences(conditional, next(iter(unconditional), None), torch.cat(kl).cpu())

    def over_tokens(self, by_step: Tensor) -> Tensor:
        """Values (N, S) of steps -> means over the tokens of each image (N,)."""
        return (by_step * self.share).sum(1)

    @torch.no_grad()
    def head_samples(self, config: LazyMARConfig | None, tokens: int, samples: int) -> Tensor:
        """Samples (tokens, samples, c) of the head for fixed z of MAR; all settings share their noise.

        The tokens lie evenly over the decoding order, of the images of the first batch in turn.
        """
        device = self.model.fake_latent.device
        denoiser = denoiser_of(self.model, config, self.diffusion)
        chance = torch.Generator().manual_seed(0)
        shape = (samples, self.diffusion.num_timesteps + 1, self.model.token_dim)
        images, found = len(self.batches[0].labels), []
        for token in range(tokens):
            rank = (2 * token + 1) * self.plan.seq_len // (2 * tokens)
            number, step = next(x for x in enumerate(self.plan.steps) if rank < x[1].stop)
            image = token % images
            z = self.z[0][number][image::images, rank - step.start]  # (branches, D)
            z = z if step.cfg != 1.0 else z[:1]
            noise = torch.randn(shape, generator=chance).to(device)
            rows = z.repeat_interleave(samples, 0)
            found.append(denoiser(rows, noise, step.cfg, 1.0))
        return torch.stack(found)
