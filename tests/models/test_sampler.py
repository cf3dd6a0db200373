"""Claims about speed's machinery: nothing of it changes what is sampled."""

import pytest
import torch
import torch.nn.functional as F

from models import sampling_copy as sampling_copy_module
from models.decoding import Decoding
from models.denoiser import ADALN_OUTPUTS, FINAL_COLUMNS, ModulationTable, time_table
from models.lazy_mar import LazyMARConfig
from models.sampler import Sampler
from models.sampling_copy import CastLinear, PackedLinear, sampling_copy, sampling_linear
from tests.support.golden_data import RECORDED, golden, golden_model, golden_noise, relative_error
from tests.support.sampling import CLOSE, CONFIGS, noise_of, sample, small_mar

KINDS = {"mar": None, "lazymar": CONFIGS["all"], "from the first step": LazyMARConfig(warmup=0)}


def batch(sampler: Sampler, seeds, labels, lazy_mar, **kwargs):
    return sampler.sample_tokens(
        len(seeds), 12, 3.0, labels=labels, noise=noise_of(sampler.model, seeds),
        lazy_mar=lazy_mar, **kwargs,
    )  # fmt: skip


@pytest.mark.parametrize("lazy_mar", KINDS.values(), ids=KINDS)
def test_a_sampler_leaves_nothing_of_one_batch_in_the_next(lazy_mar):
    model = small_mar()
    sampler = Sampler(model, torch.float32)
    for seeds, labels in (((3, 4), (1, 2)), ((5, 6), (0, 1)), ((3, 4), (1, 2)), ((7,), (4,))):
        expected = sample(model, seeds=seeds, labels=labels, lazy_mar=lazy_mar)
        assert torch.equal(batch(sampler, seeds, labels, lazy_mar), expected)


@pytest.mark.parametrize("lazy_mar", [None, CONFIGS["all"]], ids=["mar", "lazymar"])
def test_the_first_step_of_an_image_does_not_depend_on_its_batch(monkeypatch, lazy_mar):
    first = []
    original = Decoding._first_conditions

    def record(self, classes):
        z = original(self, classes)
        first.append(z)
        return z

    monkeypatch.setattr(Decoding, "_first_conditions", record)
    model = small_mar()
    sample(model, seeds=(3, 4, 5, 6), labels=(1, 2, 1, 0), lazy_mar=lazy_mar)
    sample(model, seeds=(9, 5), labels=(3, 1), lazy_mar=lazy_mar)
    crowd, pair = first
    assert torch.equal(crowd[[2, 6]], pair[[1, 3]])  # conditional and unconditional row
    assert not torch.equal(crowd[0], crowd[1])


def test_modulations_ahead_equal_those_of_each_step():
    model = small_mar(num_sampling_steps="ddim25")
    net, diffusion = model.diffloss.net, model.diffloss.gen_diffusion
    times = time_table(net, diffusion)
    columns = FINAL_COLUMNS + [(b, name) for b in (4, 1) for name in ADALN_OUTPUTS]
    table = ModulationTable(net, times, columns)
    condition = torch.randn(7, 32)
    for count in (2, 5, 8):
        ahead = list(table.ahead(condition, times, count))
        assert len(ahead) == 25
        for i in (0, 11, 24):
            embedding = torch.nn.functional.silu(times[i] + condition)
            for column, (block, name) in enumerate(columns[:count]):
                layer = net.final_layer if block < 0 else net.res_blocks[block]
                outputs = layer.adaLN_modulation[1](embedding).split(32, dim=1)
                expected = outputs[ADALN_OUTPUTS.index(name)] + (name == "scale")
                assert relative_error(ahead[i][:, column], expected) < CLOSE


def test_a_sampling_copy_shares_what_it_does_not_change_and_changes_nothing():
    model = small_mar().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    copy = sampling_copy(model, torch.bfloat16, whole=model.diffloss)
    assert model.training
    assert not copy.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    table, own = copy.encoder_pos_embed_learned, model.encoder_pos_embed_learned
    assert table.data_ptr() == own.data_ptr()
    assert own.requires_grad
    assert not table.requires_grad
    assert copy.diffloss.net.res_blocks[0].in_ln.weight.dtype == torch.bfloat16
    assert copy.encoder_blocks[0].norm1.weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outputs", [None, slice(0, 48), slice(48, 144)])
def test_packed_products_equal_plain_ones(monkeypatch, dtype, outputs):
    if not (torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_supported()):
        pytest.skip("needs oneDNN on AVX-512")
    weight, bias = torch.randn(144, 96), torch.randn(144)
    packed, cast = PackedLinear(weight, bias, dtype), CastLinear(weight, bias, dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    for shape in ((1, 96), (5, 96), (2, 7, 96), (130, 96)):
        x = torch.randn(shape)
        assert packed(x, outputs).dtype == dtype
        assert relative_error(packed(x, outputs).float(), cast(x, outputs).float()) < tolerance
    x = torch.randn(2, 9, 96)[:, 2:5]
    assert relative_error(packed(x, outputs).float(), cast(x, outputs).float()) < tolerance


def test_small_float32_weights_are_packed_only_where_mkl_is_slow(monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("needs oneDNN")
    arguments = torch.randn(96, 96), torch.randn(96), torch.float32
    monkeypatch.setattr(sampling_copy_module, "mkl_lacks_avx512", lambda: False)
    assert isinstance(sampling_linear(*arguments), CastLinear)
    monkeypatch.setattr(sampling_copy_module, "mkl_lacks_avx512", lambda: True)
    packed = sampling_linear(*arguments)
    assert isinstance(packed, PackedLinear)
    for rows in (1, 56, 57, 200):  # 2^19 multiply-adds are 56.9 rows of 96^2
        x = torch.randn(rows, 96)
        assert relative_error(packed(x), F.linear(x, *arguments[:2])) < 1e-6
        assert bool(packed._packed) == (rows >= 57)


@pytest.mark.parametrize("lazy_mar", [None, CONFIGS["all"]], ids=["mar", "lazymar"])
def test_packing_does_not_change_the_image(monkeypatch, lazy_mar):
    model = small_mar()
    monkeypatch.setattr(sampling_copy_module, "mkl_lacks_avx512", lambda: False)
    plain = sample(model, lazy_mar=lazy_mar)
    monkeypatch.setattr(sampling_copy_module, "PACKED_FROM", 0)
    assert relative_error(sample(model, lazy_mar=lazy_mar), plain) < CLOSE


@pytest.mark.slow
@RECORDED
def test_compiled_sampling_equals_the_recorded_latents(file, key):
    sampler = Sampler(golden_model(), torch.float32, compile=True)
    noise, labels = golden_noise(file)
    latents = sampler.sample_tokens(
        2, 64, 3.0, labels=labels, noise=noise, lazy_mar=key.startswith("lazy")
    )
    assert relative_error(latents, golden(file)[key]) < 1e-4


def test_compiled_sampling_is_the_same_in_all_its_variants(monkeypatch):
    """With the compiler's front end alone; `slow` tests take its back end too."""
    config, compile = torch._dynamo.config, torch.compile
    if not hasattr(config, "fail_on_recompile_limit_hit"):
        pytest.skip("this PyTorch falls back to eager mode in silence")
    monkeypatch.setattr(config, "fail_on_recompile_limit_hit", True)
    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: compile(f, backend="eager", **kwargs))
    torch._dynamo.reset()
    model = small_mar(num_sampling_steps="ddim10")
    sampler = Sampler(model, torch.float32, compile=True)
    for cfg in (3.0, 1.0):
        for seeds in ((3,), (3, 4), (3, 4, 5)):
            for lazy_mar in (None, CONFIGS["all"]):
                arguments = {"labels": [1] * len(seeds), "lazy_mar": lazy_mar}
                arguments["noise"] = noise_of(model, seeds)
                compiled = sampler.sample_tokens(len(seeds), 6, cfg, **arguments)
                plain = model.sample_tokens(len(seeds), 6, cfg, **arguments)
                assert relative_error(compiled, plain) < CLOSE


def test_graphs_without_cuda_are_refused():
    with pytest.raises(ValueError, match="graphs need a model on CUDA, not on cpu"):
        Sampler(small_mar(), torch.float32, graphs=True)


def test_labels_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"labels have shape \(\); this batch needs \(2,\)"):
        small_mar().sample_tokens(2, labels=torch.tensor(1))
