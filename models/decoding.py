"""Decoding: MAR's decoding loop for one batch size and one plan, plain or with LazyMAR.

The loop calls a predictor, which computes z for the tokens of a step, and a denoiser, which samples these
tokens given z. Every count comes from the plan, and nothing in the loop waits for the device. The calls
communicate through tensors that are allocated once, so that they can be CUDA graphs.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from models.denoiser import Denoiser, PlainDenoiser
from models.graphs import CudaGraphs, Runner, call_now
from models.head_config import HeadConfig, denoising_runs
from models.lazy_head import LazyDenoiser
from models.lazy_mar import LazyMARConfig
from models.lazy_predictor import LazyPredictor
from models.noise import ImageNoise
from models.plan import DecodingPlan, DecodingStep
from models.predictor import PlainPredictor, Predictor

if TYPE_CHECKING:
    from models.mar import MAR

MakePredictor = Callable[["MAR", Tensor, Tensor], Predictor]
MakeDenoiser = Callable[["MAR"], Denoiser]


class Decoding:
    """Decodes batches of `bsz` images, one after another.

    Rows: the conditional images, then with guidance the unconditional ones.
    """

    def __init__(
        self,
        model: "MAR",
        bsz: int,
        plan: DecodingPlan,
        config: LazyMARConfig | None,
        temperature: float,
        head: HeadConfig | None = None,
        compile: bool = False,
        graphs: bool = False,
        predictor: MakePredictor | None = None,
        denoiser: MakeDenoiser | None = None,
    ) -> None:
        """model: a sampling copy of a MAR; compile: its head with torch.compile.

        graphs: record CUDA graphs from the second batch on. predictor, denoiser: make other ones,
        called with model, order (R, L) and embedding (R, D), and with the model.
        """
        self.model, self.bsz, self.plan, self.temperature = model, bsz, plan, temperature
        self.branches = 2 if plan.guided else 1
        rows, most = self.branches * bsz, max(step.stop - step.start for step in plan.steps)
        net, own = model.diffloss.net, model.diffloss.gen_diffusion
        like = model.fake_latent  # for device and dtype
        device, channels = like.device, model.token_dim
        self.order = torch.empty(rows, model.seq_len, dtype=torch.long, device=device)
        self.embedding = like.new_empty(rows, model.fake_latent.shape[1])
        self.tokens = torch.zeros(bsz, model.seq_len, channels, device=device)
        self.z = like.new_empty(rows * most, model.decoder_norm.normalized_shape[0])
        self.runs = denoising_runs(head, own, plan)
        runs = {run.num_steps: run for run in self.runs}
        counts = [step.stop - step.start for step in plan.steps]
        sizes = [n * (run.num_steps + 1) for n, run in zip(counts, self.runs, strict=True)]
        self.noise = torch.empty(bsz * max(sizes) * channels, device=device)  # of one step
        self.coupling = {  # by number of denoising steps
            n: torch.tensor(run.coupling, dtype=torch.float32, device=device)
            for n, run in runs.items()
            if run.coupling is not None
        }
        self.sampled = torch.empty(bsz * most, channels, device=device)
        self.cfg = torch.empty((), device=device)
        self.cfg_of = torch.tensor([step.cfg for step in plan.steps], device=device)

        make = predictor or PlainPredictor
        if predictor is None and config is not None:
            make = partial(LazyPredictor, plan=plan, config=config)
        self.predictor: Predictor = make(model, self.order, self.embedding)
        self.denoiser: Denoiser
        if denoiser is not None:
            self.denoiser = denoiser(model)
        elif config is not None and config.head_cache:
            self.denoiser = LazyDenoiser(net, [*runs.values()], config, own.num_timesteps, compile)
        else:
            self.denoiser = PlainDenoiser(net, [*runs.values()], compile)
        self.first_z: dict[int | None, Tensor] = {}  # label -> z (L, D) of step 0, raster order
        self.class_embedding = like.new_empty(1, self.embedding.shape[1])  # of one class
        self.class_z = like.new_empty(model.seq_len, self.z.shape[1])
        # The same head call repeats within a run, so it must not share memory with the steps.
        self.run_step: Runner = CudaGraphs() if graphs else call_now
        self.run_head: Runner = CudaGraphs() if graphs else call_now
        self.run_class: Runner = CudaGraphs() if graphs else call_now

    @torch.no_grad()
    def __call__(
        self,
        labels: Sequence[int] | None,
        noise: ImageNoise,
        progress: bool = False,
        known: Tensor | None = None,
    ) -> Tensor:
        """labels of the images, noise on the model's device -> tokens (B, L, c), raster order.

        known (B, L, c), raster order: holds the tokens that the plan takes as known.
        """
        self._prepare(labels, noise, known)
        for _ in self._decode(noise, progress):
            pass
        return self._in_raster_order(self.plan.seq_len)

    @torch.no_grad()
    def partial_results(
        self, labels: Sequence[int] | None, noise: ImageNoise, known: Tensor | None = None
    ) -> Iterator[tuple[DecodingStep, Tensor]]:
        """As a call, step by step: each step and the tokens (B, L, c) after it, 0 where unknown."""
        self._prepare(labels, noise, known)
        for step in self._decode(noise, progress=False):
            yield step, self._in_raster_order(step.stop)

    def _in_raster_order(self, known: int) -> Tensor:
        """The first `known` tokens of the decoding order, in raster order (B, L, c), others 0."""
        order = self.order[: self.bsz, :known, None].expand(-1, -1, self.tokens.shape[2])
        return torch.zeros_like(self.tokens).scatter_(1, order, self.tokens[:, :known])

    def _prepare(
        self, labels: Sequence[int] | None, noise: ImageNoise, known: Tensor | None = None
    ) -> None:
        """The part that waits for the device: upload the batch, and z of the first step."""
        self.order.copy_(noise.orders.flip(1).repeat(self.branches, 1))  # their front comes last
        embeddings = [self.model.class_embedding(labels, self.bsz)]
        if self.branches == 2:
            embeddings.append(self.model.class_embedding(None, self.bsz))
        torch.cat(embeddings, out=self.embedding)
        first = self.plan.steps[0]
        if known is not None:
            order = self.order[: self.bsz, : first.start, None]
            self.tokens[:, : first.start] = known.gather(1, order.expand(-1, -1, known.shape[2]))
        if not self.predictor.first_fills and first.start == 0:
            classes: list[int | None] = [None] * self.bsz if labels is None else [*labels]
            classes += [None] * self.bsz if first.guided else []
            self._write_z(self._first_conditions(classes))

    def _decode(self, noise: ImageNoise, progress: bool) -> Iterator[DecodingStep]:
        """All steps, each when it is done; nothing here waits for the device."""
        for i, step in enumerate(tqdm(self.plan.steps, disable=not progress, leave=False)):
            if step.start > 0 or self.predictor.first_fills:
                self.run_step(i, partial(self._predict, step))
            n, steps = self.bsz * (step.stop - step.start), self.runs[i].num_steps
            self._write_noise(step, noise.head, self._noise(n, steps))
            self.cfg.copy_(self.cfg_of[i])
            rows = n if step.cfg == 1.0 else self.branches * n
            denoise = partial(self._denoise, n, rows, steps)
            self.run_head((n, rows, steps), denoise)
            self.tokens[:, step.start : step.stop] = self.sampled[:n].unflatten(0, (self.bsz, -1))
            yield step

    def _predict(self, step: DecodingStep) -> None:
        self._write_z(self.predictor(step, self.tokens))

    def _write_z(self, z: Tensor) -> None:
        """z (rows, n, D)."""
        self.z[: z.shape[0] * z.shape[1]] = z.flatten(0, 1)

    def _noise(self, n: int, steps: int) -> Tensor:
        """Buffer for the noise (n, N+1, c) of a step's denoising run: a view."""
        channels = self.tokens.shape[2]
        return self.noise[: n * (steps + 1) * channels].view(n, steps + 1, channels)

    def _write_noise(self, step: DecodingStep, noise: Tensor, out: Tensor) -> None:
        """noise (B, L, T+1, c) of the tokens of this step -> out (n, N+1, c)."""
        now = self.order[: self.bsz, step.start : step.stop, None, None]
        found = noise.gather(1, now.expand(-1, -1, *noise.shape[2:])).flatten(0, 1)
        weights = self.coupling.get(out.shape[1] - 1)
        if weights is None:
            out.copy_(found)
        else:
            torch.matmul(weights, found.to(out.dtype), out=out)

    def _denoise(self, n: int, rows: int, steps: int) -> None:
        """z (rows, D) and noise (n, N+1, c) -> sampled (n, c)."""
        noise = self._noise(n, steps)
        self.sampled[:n] = self.denoiser(self.z[:rows], noise, self.cfg, self.temperature)

    def _first_conditions(self, classes: Sequence[int | None]) -> Tensor:
        """z (rows, n, D) of the first step, which depends on the class alone: computed once for each.

        One class at a time, so that the images of a batch do not change each other's rounding.
        """
        names = sorted(set(classes), key=lambda label: -1 if label is None else label)
        self.first_z = {k: z for k, z in self.first_z.items() if k in names}  # forget other classes
        for name in names:
            if name not in self.first_z:
                embedding = self.model.class_embedding(None if name is None else [name], 1)
                self.class_embedding.copy_(embedding)
                self.run_class("class", self._predict_class)
                self.first_z[name] = self.class_z.clone()
        table = torch.stack([self.first_z[name] for name in names])  # (classes, L, D)
        rows = torch.tensor([names.index(label) for label in classes], device=self.order.device)
        return table[rows[:, None], self.order[: len(classes), : self.plan.steps[0].stop]]

    def _predict_class(self) -> None:
        """class_embedding (1, D) -> class_z (L, D): z of all tokens while none is known."""
        length = self.model.seq_len
        raster = torch.arange(length, device=self.order.device)[None]
        z = self.model.predict(self.tokens[:1, :0], raster, length, self.class_embedding)
        self.class_z.copy_(z[0])
