"""The count of operations equals what torch counts, for MAR and LazyMAR, as published and as executed."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.mar_work import count, work_of
from engine import cli, published
from models import mar
from models.flops import MARGeometry, Work, image_work
from models.head_config import HeadConfig, denoising_runs
from models.lazy_mar import CACHES, LazyMARConfig, step_policies
from models.order import OrderConfig
from models.plan import DecodingPlan
from util import flops

LAZY = LazyMARConfig(
    warmup=1, interval=3, probe_layer=1, keep=((0.0, 1.0), (0.3, 0.5), (0.6, 0.1)), keep_floor=1,
    head_interval=3, head_warm=0.3,
)  # fmt: skip
CONFIGS = {
    "mar": None,
    "lazymar": LAZY,
    "token": LAZY.with_caches(["token"]),
    "condition": LAZY.with_caches(["condition"]),
    "head": LAZY.with_caches(["head"]),
    "no caches": LAZY.with_caches([]),
    "first": replace(LAZY, warmup=0, probe_layer=0),
    "probe last": replace(LAZY, probe_layer=2),
    "probe behind": replace(LAZY, probe_layer=9),
    "constants": replace(LAZY, head_interval=2, head_skip=(0, 2), head_warm=0.2),
    "modulations": replace(LAZY, head_reuse_adaln=True),
    "local": replace(LAZY, lazy_step="local"),
    "frozen buffer": replace(LAZY, buffer_refresh=False),
    "local, frozen buffer, both branches": replace(
        LAZY, lazy_step="local", buffer_refresh=False, condition_cache=False
    ),
    "listed refreshes": replace(LAZY, refresh_steps=(0.0, 0.5), forecast_order=1),
}
HEADS = {
    "annealed": HeadConfig(steps=(4, 2), t_start=950),
    "second order": HeadConfig(steps=3, spacing="logsnr", solver="2m", tau=0.5),
    "guided late": HeadConfig(guidance_start=0.5),
    "guided inside": HeadConfig(guidance_interval=(200, 800)),
    "all": HeadConfig(steps=(4, 3), guidance_start=0.3, guidance_interval=(0, 500)),
}
GEOMETRIES = {
    "tiny": {},
    "no buffer": {"buffer_size": 0, "patch_size": 2, "img_size": 24},
    "unequal": {
        "encoder_embed_dim": 48, "decoder_embed_dim": 96, "mlp_ratio": 2.7,
        "vae_embed_dim": 5,
    },
}  # fmt: skip
GUIDED = (4, 3.0)  # num_iter, guidance
CASES = [("tiny", name, GUIDED) for name in CONFIGS]
CASES += [("no buffer", name, GUIDED) for name in ("local", "frozen buffer")]
CASES += [(geometry, "lazymar", GUIDED) for geometry in ("no buffer", "unequal")]
CASES += [("tiny", name, (4, 1.0)) for name in ("mar", "lazymar")]
CASES += [("tiny", "lazymar", few_or_many) for few_or_many in ((1, 3.0), (11, 3.0))]


def meta_mar(geometry: str) -> mar.MAR:
    """A small MAR without contents."""
    small = {"img_size": 12, "buffer_size": 4, "encoder_depth": 1, "decoder_depth": 3}
    small |= {"diffloss_d": 3, "diffloss_w": 24, "num_sampling_steps": "4"}
    with torch.device("meta"):
        return mar.mar_tiny(**{**small, **GEOMETRIES[geometry]}).eval().requires_grad_(False)


def cached(total: int, heads: int, width: int):
    """A KVUpdate that attends to `total` positions, whatever was computed."""

    def update(k, v):
        both = torch.zeros(len(k), heads, total, width // heads)
        return both, both

    return update


class Published:
    """LazyMAR's algorithm (its sections 3.2 to 3.4 and its head cache), step by step on modules.

    Nothing is remembered: tensors without contents have only their sizes.
    """

    def __init__(self, model, plan: DecodingPlan, config: LazyMARConfig | None, head=None):
        self.model, self.plan, self.config = model, plan, config
        self.runs = denoising_runs(head, model.diffloss.gen_diffusion, plan)
        self.total = model.buffer_size + model.seq_len
        self.policies = step_policies(config, plan, model.buffer_size) if config else {}

    def work(self) -> Work:
        """All steps, part by part."""
        parts = {"encoder": 0.0, "decoder": 0.0, "head": 0.0}
        for step, run in zip(self.plan.steps, self.runs, strict=True):
            branches = 2 if step.guided else 1
            lazy = self.config is not None and not self.policies[step.index].refresh
            rows = 1 if lazy and self.config.condition_cache else branches
            token = lazy and self.config.token_cache
            parts["encoder"] += self.counted(self.encoder, step, rows, token)
            parts["decoder"] += self.counted(self.decoder, step, rows, token)
            parts["head"] += (step.stop - step.start) * self.counted(self.head, run, branches)
        return Work(**parts)

    @staticmethod
    def counted(function, *arguments) -> float:
        with torch.device("meta"):
            return count(lambda: function(*arguments))

    def encoder(self, step, rows, lazy):
        model, width = self.model, self.model.z_proj.out_features
        first = step.previous if lazy else 0
        order = torch.zeros(rows, step.start - first, dtype=torch.long)
        tokens = torch.zeros(rows, step.start - first, model.token_dim)
        x = model.embed_known(tokens, order, torch.zeros(rows, width))
        heads = model.encoder_blocks[0].attn.num_heads
        update = cached(model.buffer_size + step.start, heads, width) if lazy else None
        x = x[:, model.buffer_size :] if lazy and not self.config.buffer_refresh else x
        model.encode(x, [update] * len(model.encoder_blocks))

    def decoder(self, step, rows, lazy):
        model = self.model
        new = model.buffer_size + step.start - (step.previous if lazy else 0)
        new -= model.buffer_size if lazy and not self.config.buffer_refresh else 0
        model.decoder_embed(torch.zeros(rows, new, model.z_proj.out_features))
        width, blocks = model.decoder_embed.out_features, model.decoder_blocks
        x = torch.zeros(rows, self.total, width)
        kept = self.policies[step.index].kept if lazy else self.total
        local = lazy and self.config.lazy_step == "local"
        for i, block in enumerate(blocks):
            if local:
                block(x[:, :kept], cached(self.total, block.attn.num_heads, width))
            elif not lazy or i < self.config.probe_layer:
                x = block(x)
            elif i == self.config.probe_layer:
                attended = block.attn(block.norm1(x))  # of all positions
                x = block.finish(x[:, :kept], attended[:, :kept])
            else:
                x = block(x, cached(self.total, block.attn.num_heads, width))

    def head(self, run, branches):
        net, steps = self.model.diffloss.net, run.num_steps
        own = self.model.diffloss.num_sampling_steps
        width = net.cond_embed.in_features

        def inputs(rows):
            x = torch.zeros(rows, self.model.token_dim)
            return x, torch.zeros(rows), torch.zeros(rows, width)

        config = self.config
        for i in range(steps):
            first = i < steps - 1 and run.guided[i] and not run.guided[i + 1]
            full = config is None or not config.head_cache or first
            if full or config.is_full(i, steps, own):
                net(*inputs(branches if run.guided[i] else 1))
                continue
            x, t, c = inputs(1)
            embedding, hidden = net.time_embed(t) + net.cond_embed(c), net.input_proj(x)
            for b, block in enumerate(net.res_blocks):
                if b in config.head_skip:
                    continue
                if not config.head_reuse_adaln:
                    block.adaLN_modulation[1](embedding)
                if config.is_warm(i, steps):
                    block.mlp(hidden)
            if config.head_reuse_adaln:
                net.final_layer.linear(hidden)
            else:
                net.final_layer(hidden, embedding)


@pytest.mark.parametrize(("geometry", "name", "sampling"), CASES)
def test_the_count_is_what_torch_counts(geometry, name, sampling):
    model, config = meta_mar(geometry), CONFIGS[name]
    plan = DecodingPlan.create(model.seq_len, *sampling)
    sizes = MARGeometry.from_model(model)
    assert image_work(sizes, plan, config) == Published(model, plan, config).work()
    executed, counted = (
        image_work(sizes, plan, config, executed=True),
        work_of(model, config, plan, itemsize=4),
    )
    assert executed.encoder + executed.decoder == counted.transformer_flops
    assert executed.head == counted.head_flops


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("lazy", ["mar", "lazymar", "local"])
def test_every_field_of_the_head_is_counted(name, lazy):
    model, config, head = meta_mar("tiny"), CONFIGS[lazy], HEADS[name]
    plan = DecodingPlan.create(
        model.seq_len, 6, 3.0, guidance_start=head.guidance_start, order=OrderConfig("gtr")
    )
    sizes = MARGeometry.from_model(model)
    published = image_work(sizes, plan, config, head=head)
    assert published == Published(model, plan, config, head).work()
    executed = image_work(sizes, plan, config, executed=True, head=head)
    counted = work_of(model, config, plan, itemsize=4, head=head)
    assert executed.encoder + executed.decoder == counted.transformer_flops
    assert executed.head == counted.head_flops
    plain = DecodingPlan.create(model.seq_len, 6, 3.0, order=OrderConfig("gtr"))
    assert published.head < image_work(sizes, plain, config).head


def test_guidance_costs_a_second_branch_and_every_cache_saves():
    geometry = MARGeometry.from_model(meta_mar("tiny"))
    free, guided = (DecodingPlan.create(geometry.seq_len, 12, cfg) for cfg in (1.0, 3.0))
    for config in (None, CONFIGS["token"]):
        alone, both = (image_work(geometry, plan, config) for plan in (free, guided))
        assert both.total == 2 * alone.total
    plain, lazy = (image_work(geometry, guided, config).total for config in (None, LAZY))
    for name in CACHES:
        others = [other for other in CACHES if other != name]
        assert image_work(geometry, guided, LAZY.with_caches([name])).total < plain
        assert image_work(geometry, guided, LAZY.with_caches(others)).total > lazy


def test_a_dry_run_counts_what_is_executed():
    host = cli.named("mar_base").host()
    with torch.device("meta"):
        assert host.flops_per_image(host.build()) == pytest.approx(13.927e12, rel=1e-4)


# ---- the command -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def printed() -> tuple[str, dict]:
    """What `python -m util.flops` prints: the tables, and the document of its last line."""
    text = flops.report(flops.tabulate(num_iter=64))
    return text, json.loads(text.splitlines()[-1])


def test_the_document_holds_the_papers_table(printed):
    _, document = printed
    assert list(document) == ["mar_base", "mar_large", "mar_huge", "mar_tiny"]
    for name, found in document.items():
        assert list(found) == ["plain", "lazy", "balanced", "fast", "ratio"]
        assert found["plain"] / found["fast"] >= 8
        if name == "mar_tiny":
            continue
        plain, lazy = (published.tflops_at_64(name, lazy_mar) for lazy_mar in (False, True))
        assert 0.94 <= found["plain"] / plain <= 1
        assert abs(found["lazy"] / lazy - 1) < 0.06
        assert abs(found["ratio"] / (plain / lazy) - 1) < 0.03
    assert 65 <= document["mar_huge"]["plain"] <= 69


def test_shares_of_the_caches_add_up_to_all_that_is_saved():
    for name, modes in flops.tabulate(num_iter=64).items():
        shares = flops.shares(modes)
        saved = modes["MAR"].published.total - modes["LazyMAR"].published.total
        assert sum(share.share for share in shares.values()) == pytest.approx(1), name
        assert shares["head"].alone == pytest.approx(shares["head"].last)  # independent
        assert shares["token"].alone + shares["condition"].alone > saved - shares["head"].alone


def test_every_model_and_mode_has_its_row(printed, document_of):
    text, document = printed
    for name in document:
        for mode in flops.modes(64):
            assert sum(line.startswith(f"| {name} | {mode} |") for line in text.splitlines()) == 1
    fewer = document_of(flops, "--num_iter", 32)
    assert fewer["mar_base"]["plain"] < document["mar_base"]["plain"]
