"""Every path of the product runs on CUDA tensors, and its loops neither wait nor copy.

The device is a fake one, see tests/support/fake_cuda.py: it finds tensors on the wrong device, constants of
the CPU inside a loop and hidden synchronisations, in the dtypes that a card computes in. What numbers come
out, and whether a kernel exists, only a card can show.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch

from engine.mar import MarGenerator, SamplingConfig
from main_mar import latents_from
from models import gpt_sampler
from models.decoding import Decoding
from models.detok import DeTok
from models.fast_mar import PRESETS
from models.gpt_images import GPTGenerator, GPTSampling
from models.gpt_sampler import GPTDecoding, GPTSampler
from models.graphs import call_now
from models.head_config import ANNEALINGS, SOLVERS, HeadConfig
from models.lazy_mar import CACHES, TOKEN_SELECTIONS, LazyMARConfig
from models.line_config import LineARConfig
from models.line_methods import METHODS
from models.linear_tokenizer import LinearTokenizer
from models.order import ORDERS
from models.sampler import Sampler
from models.tokenizers import AutoencoderKL
from models.vq import vq_tiny
from tests.support.fake_cuda import fake_cuda
from tests.support.llamagen_data import small_gpt
from tests.support.sampling import noise_of, small_mar
from util.device import to_host
from util.evaluation.sums import FeatureSums
from util.metrics import Extractor
from util.training import step as training
from util.training.ema import EMA
from util.training.optimizer import LRSchedule, make_optimizer

CUDA = torch.device("cuda", 0)
SHAPES = "pretrained_models/mar_tiny/classifier.safetensors"
SMALL = {"encoder_depth": 1, "decoder_depth": 3, "diffloss_d": 2, "num_sampling_steps": "ddim6"}
GRID, TOKENS = (4, 4), 16
ALL = LazyMARConfig(warmup=2, interval=3, probe_layer=1, head_skip=(1,), head_interval=3)
HEADS = {
    **{f"annealed {name}": HeadConfig((4, 3), annealing=name) for name in ANNEALINGS},
    **{f"solver {name}": HeadConfig(4, solver=name) for name in SOLVERS},
    "2m logsnr": HeadConfig(4, spacing="logsnr", solver="2m", tau=0.5),
    "interval": HeadConfig(4, t_start=950, guidance_start=0.25, guidance_interval=(225, 807)),
}
MARS = {
    "plain": {},
    "lazy": {"lazy_mar": ALL},
    **{f"only {name}": {"lazy_mar": ALL.with_caches([name])} for name in CACHES},
    **{
        f"without {name}": {"lazy_mar": replace(ALL, **{name: False})}
        for name in ("token_cache", "condition_cache", "head_cache")
    },
    **{
        f"keep {name}": {"lazy_mar": replace(ALL, token_selection=name)}
        for name in TOKEN_SELECTIONS
    },
    "local": {"lazy_mar": replace(ALL, lazy_step="local")},
    "frozen": {"lazy_mar": replace(ALL, lazy_step="local", buffer_refresh=False)},
    "forecast": {"lazy_mar": replace(ALL, forecast_order=1)},
    "adaln": {"lazy_mar": replace(ALL, head_reuse_adaln=True)},
    "from the first step": {"lazy_mar": replace(ALL, warmup=0)},
    "chosen refreshes": {"lazy_mar": replace(ALL, refresh_steps=(0.0, 0.25, 0.6))},
    **{name: {"head": head} for name, head in HEADS.items()},
    **{f"lazy {name}": {"head": head, "lazy_mar": ALL} for name, head in HEADS.items()},
    **{f"order {name}": {"order": name, "lazy_mar": ALL} for name in ORDERS},
    "constant guidance": {"cfg_schedule": "constant"},
    "no guidance": {"cfg": 1.0, "lazy_mar": ALL},
}
GPTS = {"full": None, **{m: LineARConfig(budget=2, anchors=1, recent=1, method=m) for m in METHODS}}


@pytest.fixture
def device(monkeypatch):
    """A fake card; the loops of both samplers run in its `loop`."""
    with fake_cuda() as card:
        for kind in (Decoding, GPTDecoding):
            original = kind._decode

            def decode(self, *args, original=original):
                with card.loop():
                    return [*(original(self, *args) or ())]  # MAR's yields its steps

            monkeypatch.setattr(kind, "_decode", decode)
        yield card


def assert_on_card(tensor, shape, dtype):
    assert tensor.device == CUDA
    assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)


def sample(model, dtype=torch.bfloat16, **kwargs):
    arguments = {"num_iter": 6, "cfg": 3.0, "labels": (1, 2), **kwargs}
    return Sampler(model, dtype).sample_tokens(2, noise=noise_of(model, (3, 4)), **arguments)


@pytest.mark.parametrize("kind", MARS)
def test_mar_samples_on_a_card(device, kind):
    model = small_mar(**SMALL).to("cuda")
    assert_on_card(sample(model, **MARS[kind]), (2, 4, 8, 8), torch.float32)


@pytest.mark.parametrize("lazy_mar", [None, ALL], ids=["plain", "lazy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_mar_samples_on_a_card_in_other_precisions(device, lazy_mar, dtype):
    model = small_mar(**SMALL).to("cuda")
    assert_on_card(sample(model, dtype, lazy_mar=lazy_mar), (2, 4, 8, 8), torch.float32)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_sample_on_a_card(device, preset):
    model = small_mar(**SMALL).to("cuda")
    arguments = {**PRESETS[preset]().arguments(), "num_iter": 6}
    if arguments["head"].steps:
        arguments["head"] = replace(arguments["head"], steps=(5, 3))
    assert_on_card(sample(model, **arguments), (2, 4, 8, 8), torch.float32)


@pytest.mark.parametrize("lazy_mar", [None, ALL], ids=["plain", "lazy"])
@pytest.mark.parametrize("order", ORDERS)
def test_editing_runs_on_a_card(device, lazy_mar, order):
    model = small_mar(**SMALL).to("cuda")
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[0, :4], mask[1, 2:] = True, True  # each image takes as many steps as it needs
    latents = sample(
        model, known=torch.zeros(2, 4, 8, 8), known_mask=mask, lazy_mar=lazy_mar, order=order
    )
    assert_on_card(latents, (2, 4, 8, 8), torch.float32)


@pytest.mark.parametrize("settings", [{"top_k": 9, "top_p": 0.8}, {"cfg": 1.0}, {"greedy": True}])
def test_a_gpt_samples_on_a_card_with_other_settings(device, settings):
    model = small_gpt(GRID, n_layer=1).to("cuda", torch.bfloat16)
    codes = model.sample_tokens((1, 2), **{"cfg": 2.0, "seeds": (3, 4), **settings})
    assert_on_card(codes, (2, TOKENS), torch.int64)


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("kind", GPTS)
def test_a_gpt_samples_on_a_card(device, monkeypatch, kind, graphs):
    monkeypatch.setattr(gpt_sampler, "CudaGraphs", lambda: call_now)
    model = small_gpt(GRID, n_layer=1).to("cuda", torch.bfloat16)
    sampler = GPTSampler(model, graphs=graphs)
    arguments = {"cfg": 2.0, "line_ar": GPTS[kind], "seeds": (3, 4)}
    assert_on_card(sampler.sample_tokens((1, 2), **arguments), (2, TOKENS), torch.int64)


@pytest.mark.parametrize("kind", GPTS)
def test_teacher_forcing_through_a_cache_runs_on_a_card(device, kind):
    model = small_gpt(GRID, n_layer=1).to("cuda", torch.bfloat16)
    codes, labels = (
        torch.zeros(2, TOKENS - 1, dtype=torch.long).to("cuda"),
        torch.tensor([1, 2]).to("cuda"),
    )
    with device.loop():
        logits = model.cached_logits(codes, labels, GPTS[kind])
        assert_on_card(model(codes, labels), (2, TOKENS, 64), torch.float32)
    assert_on_card(logits, (2, TOKENS, 64), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_labels_and_seeds_become_pictures_on_the_host(device, dtype):
    model = small_mar(**SMALL).to("cuda")
    vae = AutoencoderKL(4, ch_mult=(1, 1, 2)).eval().to("cuda")
    sampling = SamplingConfig(num_iter=6, cfg=3.0, lazy_mar=ALL)
    generator = MarGenerator(model, vae, 0.2325, sampling, CUDA, dtype, vae_bsz=1)
    images = generator.generate(generator.prepare((1, 2), (3, 4)))
    assert_on_card(images, (2, 3, 32, 32), torch.float32)
    (fetched,) = to_host([images])()
    assert fetched.device.type == "cpu"


@pytest.mark.parametrize("kind", ["full", "linear"])
def test_codes_become_pictures_on_a_card(device, kind):
    model = small_gpt(GRID, n_layer=1, vocab_size=512).to("cuda", torch.bfloat16)
    generator = GPTGenerator(
        model, vq_tiny().eval().to("cuda"), GPTSampling(2.0, line_ar=GPTS[kind]), 20, vae_bsz=1
    )
    images = generator.generate(generator.prepare((1, 2), (3, 4)))
    assert_on_card(images, (2, 3, 20, 20), torch.float32)


TOKENIZERS = {
    "kl16": partial(AutoencoderKL, 4, ch_mult=(1, 1, 2)),
    "linear": partial(LinearTokenizer, 4),
    "detok": partial(
        DeTok,
        img_size=32,
        token_channels=4,
        encoder={"width": 32, "layers": 1, "heads": 2},
        decoder={"width": 32, "layers": 1, "heads": 2},
    ),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_tokenizer_encodes_and_decodes_on_a_card(device, kind):
    tokenizer = TOKENIZERS[kind]().eval()
    if kind == "detok":
        tokenizer.set_statistics(torch.zeros(4), torch.ones(4))
    tokenizer.to("cuda")
    with torch.autocast("cuda", torch.bfloat16), torch.no_grad(), device.loop():
        images = tokenizer.decode(tokenizer.encode(torch.zeros(2, 3, 32, 32, device="cuda")).mode())
    assert images.device == CUDA
    assert images.shape == (2, 3, 32, 32)


@pytest.mark.parametrize("accum_iter", [1, 2], ids=["", "accumulated"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_training_step_waits_for_the_card_once(device, dtype, checkpointing, accum_iter):
    model = small_mar(**SMALL, grad_checkpointing=checkpointing).to("cuda")
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    optimizer = make_optimizer(model, 1e-4, weight_decay=0.02)
    state = training.TrainState(model, model, EMA(model, 0.9), optimizer, scaler)
    config = training.StepConfig(LRSchedule(1e-4), 3.0, 0, 0, CUDA, dtype, accum_iter)
    vae = AutoencoderKL(4, ch_mult=(1, 1, 2)).eval().to("cuda")
    batch = torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor([1, 2])
    results = []
    device.answers += [True, True]  # of two steps: are the gradients finite
    training.train_one_epoch(
        state,
        [batch] * (2 * accum_iter),
        0,
        0,
        2,
        latents_from(False, vae, 0.2325),
        lambda seed: model.training_noise(2 * accum_iter, seed),
        config,
        lambda result, done: bool(results.append(result)),
    )
    assert state.step == 2
    assert state.skipped == 0
    assert all(result.loss.device == CUDA for result in results)
    assert all(p.device == CUDA for p in model.parameters())
    assert not device.answers


def test_features_are_extracted_and_summed_on_a_card(device):
    extractor = Extractor("shapes", SHAPES, CUDA)
    spec = extractor.spec
    layers = {"features": spec.feature_layer, "logits": spec.logits_layer}
    sums = FeatureSums(20, layers, None, spec.judge, keep=True, device=CUDA)
    for start in (0, 10):
        outputs = extractor(torch.zeros(10, 3, 64, 64, dtype=torch.uint8))
        sums.update(range(start, start + 10), outputs)
    assert all(value.device == CUDA for value in sums.sums.values())
