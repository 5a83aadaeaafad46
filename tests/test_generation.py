"""The loop from requests to pictures: what comes out when, which steps are seen, what is left in memory."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from flux import generation, images
from flux.errors import FluxError
from flux.generation import Stages, generate, split
from flux.models.nag import Nag
from flux.requests import Request

from . import tiny
from .tiny_pipeline import make_pipeline

APPLE = Request("a red apple", seeds=(5, 3), image_size=(32, 48), steps=2, negative_prompt="a", cfg_scale=2.0)
BIRDS = Request("two green birds", seeds=(5,), image_size=(48, 32), steps=3, guidance=2.0)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    tiny.write_tokenizers(folder)
    return folder


@pytest.fixture(scope="module")
def dev(tokenizers):
    return make_pipeline(tokenizers)


@pytest.fixture(scope="module")
def alone(dev):
    """Each picture of the requests, made by the pipeline's plain steps."""
    pictures = []
    for request in split([APPLE, BIRDS], 1):
        size = dev.latent_size(request.image_size)
        settings = {"num_steps": request.steps, "guidance": request.guidance, "latent_size": size}
        settings |= {"negative_prompt": request.negative_prompt, "cfg_scale": request.cfg_scale}
        *_, x = dev.generate_latents(request.prompt, 1, seed=request.seeds[0], **settings)
        pictures.append(images.to_uint8(dev.decode(x, size))[0])
    return pictures


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("keep_models", [False, True])
def test_requests_of_several_sizes_and_settings_give_the_pictures_of_each_alone(
    tokenizers, alone, stream, keep_models
):
    pipeline = make_pipeline(tokenizers)
    whole = len(pipeline.flow.parameters()["double_blocks"][0])
    made = list(generate(pipeline, [APPLE, BIRDS], stream=stream, keep_models=keep_models))
    assert [picture.shape for picture in made] == [(32, 48, 3), (32, 48, 3), (48, 32, 3)]
    assert all(np.array_equal(a, b) for a, b in zip(made, alone, strict=True))
    left = [hasattr(pipeline, name) for name in ("t5", "clip", "flow", "ae")]
    assert left == ([True] * 4 if keep_models else [False, False, stream, True])
    if stream:
        assert (len(pipeline.flow.parameters()["double_blocks"][0]) == whole) == keep_models


def test_many_prompts_keep_the_modulation(tokenizers, monkeypatch):
    """With more plans than MAX_PLANS these are made one after the other, and the pictures stay the same."""
    requests = [replace(APPLE, prompt=prompt, seeds=(1, 2)) for prompt in ("a", "two", "birds")]
    expected = list(generate(make_pipeline(tokenizers), requests))
    pipeline = make_pipeline(tokenizers)
    monkeypatch.setattr(generation, "MAX_PLANS", 2)
    monkeypatch.setattr(pipeline.flow, "drop_modulation", lambda: pytest.fail("modulation is needed"))
    made = list(generate(pipeline, requests))
    assert all(np.array_equal(a, b) for a, b in zip(made, expected, strict=True))


def test_each_text_is_encoded_and_each_plan_made_once(dev, monkeypatch):
    encoded, planned = [], []
    encode, prepare = dev.encode, dev.prepare
    monkeypatch.setattr(dev, "encode", lambda *a: encoded.append(a[0]) or encode(*a))
    monkeypatch.setattr(
        dev, "prepare", lambda **k: planned.append((k["num_steps"], k["guidance"])) or prepare(**k)
    )
    list(generate(dev, [APPLE, BIRDS, replace(BIRDS, guidance=1.0)], keep_models=True))
    assert encoded == ["a red apple", "two green birds"]
    assert planned == [(2, 3.5), (3, 2.0), (3, 1.0)]


def test_the_decoding_batch_holds_pictures_of_one_request(dev, alone, monkeypatch):
    sizes, decode = [], dev.decode
    monkeypatch.setattr(dev, "decode", lambda x, size: sizes.append(len(x)) or decode(x, size))
    made = list(generate(dev, [APPLE, BIRDS], decoding_batch_size=2, keep_models=True))
    assert sizes == [2, 1]
    assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(made, alone, strict=True))


def test_on_step_sees_every_step_of_every_picture(dev):
    seen = []

    def on_step(request, step, x):
        assert x.shape == (1, 6, 64)
        seen.append((request.prompt, request.seeds, step, request.guidance))

    list(generate(dev, [APPLE, BIRDS], on_step=on_step, keep_models=True))
    steps = [("a red apple", (seed,), step, 3.5) for seed in (5, 3) for step in range(2)]
    assert seen == steps + [("two green birds", (5,), step, 2.0) for step in range(3)]


def test_a_stream_gives_a_picture_before_it_makes_the_next(dev):
    seen = []
    pictures = generate(
        dev, [APPLE], on_step=lambda r, *_: seen.append(r.seeds), stream=True, keep_models=True
    )
    next(pictures)
    assert seen == [(5,), (5,)]


def test_the_stages_are_timed(dev):
    stages = Stages()
    list(generate(dev, [BIRDS], keep_models=True, stages=stages))
    assert [name for name, _, _ in stages.rows] == ["text", "denoise", "decode"]
    assert [line.split()[0] for line in str(stages).splitlines()] == ["stage", "text", "denoise", "decode"]


def test_the_models_own_settings(dev):
    resolved = Request("a").resolved(dev)
    spec = dev.spec
    assert (resolved.steps, resolved.guidance, resolved.cfg_scale) == (spec.steps, spec.guidance, 1.0)
    assert (resolved.image_size, resolved.latent_size) == ((512, 512), (64, 64))
    assert resolved.resolved(dev) is resolved
    assert resolved.texts == ("a", None, None)
    assert replace(resolved, cfg_scale=2.0).texts == ("a", "", None)
    with pytest.warns(UserWarning, match="made 32x48"):
        assert Request("a", image_size=(30, 50)).resolved(dev).image_size == (32, 48)


def test_guidance_without_effect_warns(tokenizers):
    schnell = make_pipeline(tokenizers, guidance=False)
    with pytest.warns(UserWarning, match="schnell takes no guidance; 4.0 has no effect"):
        Request("a", guidance=4.0).resolved(schnell)


BAD = [
    ({"steps": 0}, "steps must be at least 1, not 0"),
    ({"seeds": ()}, "number of pictures must be at least 1"),
    ({"seeds": (1, -1)}, "seed must lie between 0 and .*, not -1"),
    ({"cfg_scale": 0.5}, r"cfg scale must be at least 1 .*0\.5"),
    ({"cfg_scale": 1.0}, "negative prompt 'a' needs a cfg scale above 1 or NAG"),
    ({"image_size": (0, 16)}, "0x16"),
    ({"cfg_end": 0.0}, "cfg end must be above 0 and at most 1, not 0.0"),
    ({"cfg_end": 1.5}, "cfg end must be above 0 and at most 1, not 1.5"),
    ({"cfg_end": 0.5, "cfg_scale": 1.0, "negative_prompt": None}, "cfg end 0.5 needs a cfg scale above 1"),
    ({"nag": Nag(5), "negative_prompt": None}, "NAG needs a negative prompt"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_values_are_named_before_any_work(dev, monkeypatch, changes, message):
    monkeypatch.setattr(dev, "encode", lambda *_: pytest.fail("must not begin"))
    with pytest.raises(FluxError, match=message):
        generate(dev, [BIRDS, replace(APPLE, **changes)])


def test_generate_images(dev, alone):
    pictures = dev.generate_images(
        APPLE.prompt, 2, 5, (32, 48), num_steps=2, negative_prompt="a", cfg_scale=2.0
    )
    assert (pictures.shape, pictures.dtype) == ((2, 32, 48, 3), np.uint8)
    assert np.array_equal(pictures[0], alone[0])
    again = dev.generate_images(BIRDS.prompt, 1, 5, (48, 32), num_steps=3, guidance=2.0)
    assert np.array_equal(again[0], alone[2])  # the pipeline is whole
    fresh = [dev.generate_images("a", image_size=(16, 16), num_steps=1) for _ in range(2)]
    assert not np.array_equal(*fresh)  # random seeds


def test_true_guidance_stops_at_its_end(tokenizers):
    """The steps before it are those of guidance in all steps, the others cost one pass."""
    pipeline = make_pipeline(tokenizers)
    latents: dict[float, list] = {}
    passes, denoise = [], pipeline.flow.denoise
    pipeline.flow.denoise = lambda *a, **k: passes.append(1) or denoise(*a, **k)
    for end in (1.0, 0.5, 0.1):
        request = replace(APPLE, seeds=(5,), steps=4, cfg_end=end)
        latents[end] = []
        passes.clear()
        list(
            generate(
                pipeline, [request], on_step=lambda r, i, x: latents[r.cfg_end].append(x), keep_models=True
            )
        )
        assert len(passes) == {1.0: 8, 0.5: 6, 0.1: 5}[end]  # always some guidance
    same = [mx.array_equal(a, b).item() for a, b in zip(latents[1.0], latents[0.5], strict=True)]
    assert same == [True, True, False, False]


@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
@pytest.mark.parametrize("pad", [True, False])
def test_nag(tokenizers, pad, cfg_scale):
    """Another picture, without true guidance in one pass a step; the same when modulation has left."""
    pipeline = make_pipeline(tokenizers)
    pipeline.t5_padding = pad  # the prompts then differ in length
    passes, denoise = [], pipeline.flow.denoise
    pipeline.flow.denoise = lambda *a, **k: passes.append(1) or denoise(*a, **k)
    request = replace(APPLE, negative_prompt="two green birds", cfg_scale=cfg_scale, nag=Nag(5))
    made = list(generate(pipeline, [request], keep_models=True))
    assert len(passes) == 2 * 2 * cfg_scale
    plain = replace(request, nag=None, negative_prompt=None if cfg_scale == 1 else request.negative_prompt)
    other = list(generate(pipeline, [plain], keep_models=True))
    assert not any(np.array_equal(a, b) for a, b in zip(made, other, strict=True))
    freed = generate(pipeline, [request])
    assert all(np.array_equal(a, b) for a, b in zip(made, freed, strict=True))


def test_split():
    assert [part.seeds for part in split([APPLE, BIRDS], 1)] == [(5,), (3,), (5,)]
    assert split([APPLE, BIRDS], 2) == [APPLE, BIRDS]


def test_the_encoders_leave_before_the_first_step(tokenizers):
    pipeline, seen = make_pipeline(tokenizers), []
    list(generate(pipeline, [BIRDS], on_step=lambda *_: seen.append(hasattr(pipeline, "t5"))))
    assert seen == [False] * 3


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("flow", float("nan"), "step 1 of the transformer gives NaN or infinity"),
        ("ae", float("nan"), "the autoencoder gives NaN or infinity"),
    ],
)
def test_numbers_that_make_a_black_picture_end_the_run_at_its_first_step(tokenizers, part, value, words):
    """A single weight in the middle of a file, which no look at its beginning finds."""
    pipeline = make_pipeline(tokenizers)
    layer = pipeline.flow.img_in if part == "flow" else pipeline.ae.decoder.conv_out
    layer.weight[0, 0] = value
    with pytest.raises(FluxError, match=words):
        list(generate(pipeline, [BIRDS], keep_models=True))
