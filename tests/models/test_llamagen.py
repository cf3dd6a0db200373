"""LlamaGen's GPT: the published architecture, its sampling, and noise that belongs to the image."""

import pytest
import torch

from models import llamagen
from models.llamagen import GPT, rope_table, rotate
from models.token_sampling import TokenSampler, uniforms_from_seeds
from tests.support.golden_data import golden
from tests.support.golden_recipe import load_shapes
from tests.support.llamagen_data import golden_gpt, random_codes, small_gpt

PUBLISHED = {"gpt_b": "GPT-B", "gpt_l": "GPT-L", "gpt_xl": "GPT-XL", "gpt_xxl": "GPT-XXL"}
FROZEN = [6866841, 8090049, 16628172]


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = getattr(llamagen, name)()
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_and_shapes_are_those_of_the_published_checkpoint(name):
    published = load_shapes(PUBLISHED[name], "llamagen_state_dicts.json")
    assert list(shapes_of(name).items()) == list(published.items())


def test_the_size_of_gpt_3b_is_the_published_one():
    parameters = sum(torch.Size(shape).numel() for shape in shapes_of("gpt_3b").values())
    assert parameters / 1e6 == pytest.approx(3096.7, rel=1e-3)


def test_logits_are_the_recorded_ones():
    data = golden("llamagen.npz")
    logits = golden_gpt()(data["idx"], data["labels"])
    assert logits.shape == (3, 64, 512)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits[:, ::8], data["logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cfg", [1, 2])
def test_greedy_codes_are_the_recorded_ones(cfg):
    data, model = golden("llamagen.npz"), golden_gpt()
    tokens = model.sample_tokens(data["labels"], cfg=float(cfg), greedy=True)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, data[f"greedy_cfg{cfg}"])
    last = model(tokens[:, :-1], data["labels"])[:, -1]
    if cfg > 1:
        free = model(tokens[:, :-1], torch.full_like(data["labels"], model.num_classes))[:, -1]
        last = free + cfg * (last - free)
    recorded = data[f"greedy_cfg{cfg}_last_logits"][:, 0]
    torch.testing.assert_close(last, recorded, rtol=1e-4, atol=1e-4)


def test_the_rotation_of_the_class_token_is_zero():
    rope = rope_table((3, 5), 8, torch.device("cpu"))
    assert rope.shape == (16, 4, 2)
    assert (rope[0] == 0).all()
    assert torch.equal(rope[1], torch.tensor([[1.0, 0.0]] * 4))
    x = torch.randn(1, 2, 16, 8)
    turned = rotate(x, rope)
    assert (turned[:, :, 0] == 0).all()
    torch.testing.assert_close(turned[:, :, 1:].norm(dim=-1), x[:, :, 1:].norm(dim=-1))


def test_scores_between_cells_depend_on_their_offset_alone():
    rope = rope_table((6, 6), 8, torch.device("cpu"))
    q, k = torch.randn(2, 1, 1, 1, 8)
    at = lambda x, row, col: rotate(x, rope[1 + 6 * row + col][None])  # noqa: E731
    one = (at(q, 2, 1) * at(k, 0, 4)).sum()
    torch.testing.assert_close(one, (at(q, 5, 2) * at(k, 3, 5)).sum())
    assert abs(one - (at(q, 2, 1) * at(k, 0, 3)).sum()) > 1e-4


@pytest.mark.parametrize("grid", [(8, 8), (3, 5), (5, 2), (1, 6), (6, 1)])
def test_the_full_cache_gives_the_logits_of_teacher_forcing(grid):
    model = small_gpt(grid)
    codes, labels = random_codes(model, 3), torch.tensor([0, 4, 2])
    cached = model.cached_logits(codes, labels)
    torch.testing.assert_close(cached, model(codes, labels), rtol=1e-4, atol=1e-5)


def test_the_last_code_is_never_fed_to_a_cache():
    model, labels = small_gpt((2, 3)), torch.tensor([0])
    with pytest.raises(ValueError, match="6 tokens: an image of 6 never feeds its last one"):
        model.cached_logits(torch.zeros(1, 6, dtype=torch.long), labels)
    assert model(torch.zeros(1, 6, dtype=torch.long), labels).shape == (1, 7, model.vocab_size)


def test_labels_are_a_tensor_or_a_list():
    model = small_gpt((2, 3))
    wanted = model.sample_tokens(torch.tensor([1, 4]), seeds=[0, 1])
    assert torch.equal(model.sample_tokens([1, 4], seeds=[0, 1]), wanted)
    assert torch.equal(model.sample_tokens([1, 4], seeds=torch.tensor([0, 1])), wanted)
    assert model.sample_tokens([], cfg=2.0, seeds=[]).shape == (0, 6)


def test_an_image_is_the_same_alone_in_any_batch_and_in_any_order():
    model = small_gpt((4, 6))
    labels, seeds = torch.tensor([1, 0, 3, 3]), [5, 6, 7, 2**40]
    many = model.sample_tokens(labels, cfg=2.0, seeds=seeds)
    for i in (0, 3):
        one = model.sample_tokens(labels[i : i + 1], cfg=2.0, seeds=seeds[i : i + 1])
        assert torch.equal(many[i : i + 1], one)
    turned = model.sample_tokens(labels.flip(0), cfg=2.0, seeds=seeds[::-1])
    assert torch.equal(turned.flip(0), many)
    assert not torch.equal(many[2], many[3])


def test_seeds_leave_the_global_generator_alone_and_without_them_it_decides():
    model, labels = small_gpt((4, 4)), torch.tensor([1, 2])
    state = torch.get_rng_state()
    model.sample_tokens(labels, seeds=[0, 1])
    assert torch.equal(torch.get_rng_state(), state)
    first = model.sample_tokens(labels)
    assert not torch.equal(model.sample_tokens(labels), first)
    torch.set_rng_state(state)
    assert torch.equal(model.sample_tokens(labels), first)


@pytest.mark.parametrize("greedy", [False, True])
def test_an_image_that_cannot_be_computed_has_no_codes_and_spoils_no_other(greedy):
    model = small_gpt((4, 4))
    model.cls_embedding.embedding_table.weight[3] = float("nan")
    codes = model.sample_tokens([1, 3], cfg=2.0, seeds=[0, 1], greedy=greedy)
    assert (codes[1] == -1).all()
    assert torch.equal(codes[:1], model.sample_tokens([1], cfg=2.0, seeds=[0], greedy=greedy))
    assert (codes[0] >= 0).all()


def test_without_guidance_the_unconditional_branch_has_no_effect():
    model, labels = small_gpt((4, 4)), torch.tensor([1, 2])
    plain = model.sample_tokens(labels, cfg=1.0, seeds=[0, 1])
    changed = small_gpt((4, 4))
    changed.cls_embedding.embedding_table.weight[-1] += 1
    assert torch.equal(changed.sample_tokens(labels, cfg=1.0, seeds=[0, 1]), plain)
    assert not torch.equal(
        changed.sample_tokens(labels, cfg=3.0, greedy=True),
        model.sample_tokens(labels, cfg=3.0, greedy=True),
    )


def test_guidance_ends_after_its_interval():
    model, labels = small_gpt((4, 4)), torch.tensor([1, 2, 3])
    run = lambda **kwargs: model.sample_tokens(labels, greedy=True, **kwargs)  # noqa: E731
    always, never, half = run(cfg=4.0), run(), run(cfg=4.0, cfg_interval=6)
    assert torch.equal(run(cfg=4.0, cfg_interval=15), always)
    assert torch.equal(half[:, :8], always[:, :8])
    assert not torch.equal(half, always)
    assert not torch.equal(half, never)
    tail = model(half[:, :-1], labels).argmax(-1)  # unguided predictions of what was sampled
    assert torch.equal(half[:, 8:], tail[:, 8:])


def sampler(**kwargs: object) -> TokenSampler:
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "greedy": False}
    batch = len(kwargs.get("seeds", [0]))
    fixed = {"batch": batch, "num_tokens": 4, "seeds": [0], "device": torch.device("cpu")}
    return TokenSampler(**{**settings, **fixed, **kwargs})


def test_codes_are_drawn_as_often_as_their_probability_says():
    probs = torch.tensor([0.5, 0.0, 0.2, 0.3])
    draws = sampler(seeds=range(4000))(probs.log().expand(4000, 4), 2)
    shares = torch.bincount(draws, minlength=4) / 4000
    torch.testing.assert_close(shares, probs, rtol=0, atol=0.03)
    assert shares[1] == 0


def test_temperature_top_k_and_top_p_shape_the_distribution():
    logits = torch.tensor([[0.4, 0.1, 0.3, 0.2]]).log()
    torch.testing.assert_close(
        sampler(temperature=0.5).distribution(logits),
        torch.tensor([[0.16, 0.01, 0.09, 0.04]]) / 0.3,
    )
    top_k = torch.tensor([[4 / 7, 0, 3 / 7, 0]])
    torch.testing.assert_close(sampler(top_k=2).distribution(logits), top_k)
    torch.testing.assert_close(sampler(top_k=9).distribution(logits), logits.exp())
    top_p = sampler(top_p=0.8).distribution(logits)
    torch.testing.assert_close(top_p, torch.tensor([[0.4, 0, 0.3, 0.2]]))
    assert (sampler(top_p=0.01).distribution(logits) > 0).sum() == 1


def test_the_stream_of_uniform_numbers_is_frozen():
    """A change here changes every image that anyone has named by its seed."""
    uniforms = uniforms_from_seeds([2026, 7], 3)
    assert (uniforms[0] * 2**24).long().tolist() == FROZEN
    assert torch.equal(uniforms_from_seeds([7], 3)[0], uniforms[1])
    assert torch.equal(uniforms_from_seeds([7], 2)[0], uniforms[1, :2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cfg": float("nan")}, "cfg is nan"),
        ({"cfg": None}, "cfg is None"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, r"top_p is 0.0; it must be in \(0, 1\]"),
        ({"seeds": [1]}, "1 seeds for 2 images"),
        ({"seeds": [1, -2]}, "seed -2 is negative"),
        ({"labels": torch.tensor([0, 5])}, "from 0 to 4"),
        ({"labels": torch.tensor(1)}, r"labels must be \(B,\)"),
        ({"labels": [0.7, 1.2]}, r"labels must be \(B,\)"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        small_gpt((2, 2)).sample_tokens(**{"labels": torch.tensor([0, 1]), **settings})


@pytest.mark.parametrize(
    ("geometry", "message"),
    [
        ({"block_size": 60}, "block_size is 60, which is not 7 x 7"),
        ({"grid": (4, 4), "block_size": 64}, "which is not 4 x 4"),
        ({"n_head": 5}, "multiple of 4"),
        ({"cls_token_num": 120}, "cls_token_num is 120"),
    ],
)
def test_a_geometry_that_does_not_fit_is_refused(geometry, message):
    with pytest.raises(ValueError, match=message):
        GPT(**{"dim": 32, "n_layer": 1, "n_head": 4, "vocab_size": 8, **geometry})
