"""The step cache: nothing is changed where nothing is skipped, and what is skipped when."""

import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from flux import sampler
from flux.conditioning import ControlInput, ControlNets, Guide, Picture
from flux.errors import FluxError
from flux.generation import generate
from flux.models.nag import Nag
from flux.models.transformer import Flux
from flux.requests import Request
from flux.solvers import SOLVERS
from flux.step_cache import LEVELS, Kept, StepCache

from . import controlnets, tiny
from .tiny_pipeline import make_pipeline

HIGHEST = 1e9  # all steps are near
BLOCKS, SKIPPED = 5, 4  # the test's transformer: two double blocks, three single ones
REQUEST = Request("a red apple", (5,), image_size=(32, 48), steps=5)
GUIDED = {"negative_prompt": "birds", "cfg_scale": 2.0}
PICTURE = Picture.from_array(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    tiny.write_tokenizers(folder)
    return folder


@pytest.fixture(scope="module")
def dev(tokenizers):
    return make_pipeline(tokenizers)


def draw(pipeline, request: Request, **options) -> tuple[np.ndarray, int, int]:
    """The pictures, and how many evaluations of blocks were saved of how many."""
    before = replace(pipeline.block_count)
    pictures = np.stack(list(generate(pipeline, [request], **{"keep_models": True} | options)))
    count = pipeline.block_count
    return pictures, count.saved - before.saved, count.total - before.total


@pytest.mark.parametrize(
    "options",
    [
        *({"solver": solver} for solver in SOLVERS),
        {**GUIDED, "cfg_end": 0.5},
        {"negative_prompt": "birds", "nag": Nag(5)},
        {"guide": Guide(lambda x, t: (x**2).mean(), strength=0.5)},
    ],
)
def test_threshold_0_is_to_the_bit(dev, options):
    """Every step is computed, in parts that give what the whole does."""
    request = replace(REQUEST, **options)
    plain, *nothing = draw(dev, request)
    assert nothing == [0, 0]
    made, saved, total = draw(dev, replace(request, cache=0.0))
    assert np.array_equal(made, plain)
    passes = {"heun": 9}.get(request.solver, 8 if request.cfg_end < 1 else 5)
    assert (saved, total) == (0, passes * BLOCKS)


@pytest.mark.parametrize(
    ("options", "skips"),
    [
        ({}, 2),  # of five steps the first two and the last are computed
        (GUIDED, 4),
        ({"negative_prompt": "birds", "nag": Nag(5)}, 2),
        ({"solver": "heun"}, 5),  # steps 0 1 1 2 2 3 3 4 4
        ({**GUIDED, "cfg_end": 0.8}, 4),  # the negative prompt's last pass is not the picture's last
        ({"steps": 3}, 0),
    ],
)
def test_the_first_two_steps_and_the_last_are_computed(dev, options, skips):
    request = replace(REQUEST, **options)
    made, saved, _ = draw(dev, replace(request, cache=HIGHEST))
    assert saved == skips * SKIPPED
    assert np.array_equal(made, draw(dev, request)[0]) == (skips == 0)


def test_each_picture_has_a_cache_of_its_own(dev, tokenizers):
    """As it is made alone; also when modulation has left, and in a batch that is decoded at once."""
    request = replace(REQUEST, **GUIDED, seeds=(5, 6), cache=HIGHEST)
    both, saved, _ = draw(dev, request, decoding_batch_size=2)
    assert saved == 2 * 4 * SKIPPED
    alone = [draw(dev, replace(request, seeds=(seed,)))[0][0] for seed in (5, 6)]
    assert np.array_equal(both, alone)
    assert np.array_equal(draw(make_pipeline(tokenizers), request, keep_models=False)[0], both)


def test_a_value_between_skips_some_steps(dev):
    """Of random weights steps differ by 0.36 to 0.78."""
    saved = [draw(dev, replace(REQUEST, steps=12, cache=x))[1] // SKIPPED for x in (0, 0.5, HIGHEST)]
    assert saved == sorted(saved)
    assert saved[0] == 0
    assert saved[-1] == 9
    assert any(0 < skips < 9 for skips in saved), saved


def test_what_changes_linearly_is_extrapolated_exactly():
    """And of two steps of one time, as Heun's method has, the later counts."""
    slope, start = (mx.random.normal((1, 4, 8), key=mx.random.key(seed)) for seed in range(2))
    kept = Kept()
    for t in (1.0, 0.75, 0.5, 0.5):
        kept.keep(t, slope, start + t * slope + (mx.ones_like(slope) if t == 1 else 0))
        assert len(kept.times) == len(kept.others) <= 2
    assert kept.times == (0.75, 0.5)
    assert mx.abs(kept.extrapolated(0.125) - (start + 0.125 * slope)).max() < 1e-6
    assert kept.change(1.25 * slope).item() == pytest.approx(0.25)


def inputs(flow: Flux, tokens: int = 24):
    """What a step is told, by its time: img, txt, rotary tables, vectors."""
    keys = map(mx.random.key, range(3))
    shapes = ((1, tokens, 16), (1, 7, 48), (1, 32))
    img, txt, y = (mx.random.normal(shape, key=key) for shape, key in zip(shapes, keys, strict=True))
    pe = flow.positions(sampler.text_positions(7), mx.zeros((1, tokens, 3)))

    def at(t: float, img: mx.array = img) -> tuple:
        return img, flow.embed_text(txt), pe, flow.modulation(mx.array([t]), y, mx.array([1.0]))[0]

    return img, at


def test_branches_are_not_compared_with_each_other():
    flow = tiny.randomize(Flux(tiny.FLUX), 0)
    cache, (_, at) = StepCache(HIGHEST), inputs(flow)
    saved = []
    for t, branch in ((1, "a"), (0.9, "a"), (0.9, "b"), (0.8, "a"), (0.8, "b"), (0.7, "b")):
        cache.denoise(flow, branch, t, 24, False, *at(t))
        saved.append(cache.count.saved // SKIPPED)
    assert saved == [0, 0, 0, 1, 1, 2]


def test_tokens_after_the_latents_do_not_count():
    """References hardly change, so they would hide that the picture does."""
    flow = tiny.randomize(Flux(tiny.FLUX), 0)
    _, at = inputs(flow)
    cache = StepCache(HIGHEST)
    for t in (0.8, 0.7999):
        assert cache.denoise(flow, "", t, 16, False, *at(t)).shape == (1, 24, 16)
    made = cache.denoise(flow, "", 0.7998, 16, False, *at(0.7998))
    assert made.shape == (1, 16, 16)
    whole = flow.denoise(*at(0.7998))[:, :16]
    assert 0 < mx.linalg.norm((made - whole).flatten()) < 0.1 * mx.linalg.norm(whole.flatten())
    kept = cache._kept[""]
    assert kept.first.shape == (1, 16, tiny.FLUX.hidden_size)


def test_what_is_not_a_number_is_computed():
    flow = tiny.randomize(Flux(tiny.FLUX), 0)
    img, at = inputs(flow)
    cache = StepCache(HIGHEST)
    for t in (1.0, 0.9, 0.8):
        cache.denoise(flow, "", t, 24, False, *at(t, img * math.nan if t == 0.8 else img))
    assert cache.count.saved == 0


def test_float16_stays_finite():
    """What is added to the first block's tokens may be more than float16 holds."""
    flow = tiny.randomize(Flux(tiny.FLUX), 0)
    flow.set_dtype(mx.float16)
    _, at = inputs(flow)
    cache = StepCache(HIGHEST)
    for t in (1.0, 0.9):
        cache.denoise(flow, "", t, 24, False, *at(t))
    kept = cache._kept[""]
    kept.others = tuple(1e6 * mx.ones_like(x) for x in kept.others)
    made = cache.denoise(flow, "", 0.8, 24, False, *at(0.8))
    assert made.dtype == mx.float16
    assert mx.isfinite(made).all()


def test_steps_are_compared_where_the_same_controlnets_act(tokenizers):
    """A ControlNet of the first three of eight steps: 0, 1, 3, 4 and 7 are computed."""
    pipeline = make_pipeline(tokenizers)
    pipeline.controlnets = ControlNets([controlnets.make("single")])
    given = ControlInput(PICTURE, end=3 / 8)
    request = replace(REQUEST, steps=8, cache=HIGHEST, controlnets=(given,))
    assert draw(pipeline, request)[1] == 3 * SKIPPED


@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan])
def test_bad_thresholds(dev, value):
    with pytest.raises(FluxError, match=f"the cache's threshold must be .* not {value}"):
        replace(REQUEST, cache=value).resolved(dev)


def test_levels_rise():
    assert list(LEVELS) == ["low", "medium", "high"]
    assert 0 < LEVELS["low"] < LEVELS["medium"] < LEVELS["high"]
