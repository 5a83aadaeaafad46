"""The recipe of the built-in model: vocabularies, batches, losses; both trainings for a few steps."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from flux.models.autoencoder import AutoEncoder
from flux.recipes import emoji
from flux.recipes.tiny import autoencoder, flow, latents, recipe
from flux.tokenizers import CLIPTokenizer, T5Tokenizer
from flux.training import losses, vocabularies
from flux.training.callbacks import Log
from flux.training.ema import EMA
from flux.training.optimizers import muon
from flux.training.schedules import warmup_decay
from flux.training.states import load_state
from flux.training.trainer import Trainer

needs_font = pytest.mark.skipif(not emoji.FONT.is_file(), reason="needs the font Noto Color Emoji")
TEXTS = ["a red apple on a blue background", "two red apples", "a blue boat", "red, blue & green"]


# --- vocabularies ---


def test_clip_vocabulary_merges_whole_words_and_knows_all_bytes(tmp_path):
    vocab, merges = vocabularies.train_clip(TEXTS * 3, 100)
    vocabularies.save_clip(vocab, merges, tmp_path)
    tokenizer = CLIPTokenizer.from_folder(tmp_path)
    ids = tokenizer.encode("A red Apple")
    assert ids[:5] == [
        tokenizer.bos_token_id,
        *(vocab[piece] for piece in ("a</w>", "red</w>", "apple</w>")),
        tokenizer.eos_token_id,
    ]
    assert len(set(vocab.values())) == len(vocab) == max(vocab.values()) + 1
    for text in ("zebra", "Zürich 🍎", "日本"):
        known = tokenizer.encode(text)
        assert known[1] not in (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_first_merge_is_the_most_frequent_pair():
    _, merges = vocabularies.train_clip(["ab ab ab cd cd"], 2)
    assert merges == ["a b</w>", "c d</w>"]


def test_t5_vocabulary_has_whole_words_and_t5s_special_tokens(tmp_path):
    texts = [text for c in emoji.compositions(True, ["owl", "red apple"]) for text in emoji.captions(c)]
    vocabularies.train_t5(texts, 120, tmp_path / "spiece.model")
    tokenizer = T5Tokenizer.from_folder(tmp_path, 12)
    ids = tokenizer.encode("a red apple on the left of a blue background")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert ids[-2:] == [1, 0]  # ten words, one piece each, the end, padding


# --- losses ---


def test_losses_by_hand():
    picture, target = mx.array([0.5, -1.0]), mx.array([0.0, 1.0])
    error, mse = losses.reconstruction(picture, target, 3.0)
    assert mse.item() == pytest.approx((0.25 + 4) / 2)
    assert error.item() == pytest.approx((0.5 + 2) / 2 + 3 * (0.25 + 4) / 2)
    # Against N(0, 1): the mean 2 costs 2^2 / 2, the variance 1 nothing.
    assert losses.kl(mx.array([2.0]), mx.array([0.0])).item() == pytest.approx(2.0)
    assert losses.kl(mx.array([0.0]), mx.array([np.log(4.0)])).item() == pytest.approx(0.5 * (3 - np.log(4)))


def test_times_are_logit_normal_and_shift_towards_noise():
    times = np.array(losses.flow_times(20_000, 1.0, mx.random.key(0)))
    assert np.median(times) == pytest.approx(0.5, abs=0.01)
    assert np.quantile(times, 0.8413) == pytest.approx(1 / (1 + np.exp(-1)), abs=0.01)  # one deviation
    shifted = np.array(losses.flow_times(20_000, 3.0, mx.random.key(0)))
    assert np.allclose(shifted, 3 * times / (1 + 2 * times), atol=1e-6)


def test_noised_is_the_straight_path():
    x0, noise = mx.random.normal((3, 4, 2)), mx.random.normal((3, 4, 2))
    x = losses.noised(x0, noise, mx.array([0.0, 1.0, 0.25]))
    assert np.allclose(x[0], x0[0])
    assert np.allclose(x[1], noise[1])
    assert np.allclose(x[2], 0.75 * x0[2] + 0.25 * noise[2], atol=1e-6)


# --- batches ---


@needs_font
def test_autoencoder_batches_are_crops_first_and_pictures_last():
    batch = autoencoder.picture_batches(2, steps=10, seed=0, rank=0)
    shapes = [batch(step).shape for step in range(10)]
    assert shapes[:4] == [(8, 32, 32, 3)] * 3 + [(2, 64, 64, 3)]
    assert shapes[6:] == [(2, 64, 64, 3)] * 4
    assert np.array_equal(batch(5), batch(5))
    other = autoencoder.picture_batches(2, steps=10, seed=0, rank=1)
    assert not np.array_equal(batch(5), other(5))


@needs_font
def test_every_crop_shows_some_of_a_subject():
    rng, render = np.random.default_rng(0), emoji.Renderer()
    seen = set()
    for _ in range(300):
        composition = emoji.draw_composition(rng)
        part = autoencoder.crop(render(composition), composition, rng)
        assert part.shape == (32, 32, 3)
        seen.add((part != emoji.COLOURS[composition.colour]).any())
    assert seen == {True}


def test_flow_batches_drop_captions_with_their_share_and_match_the_rest():
    pair = emoji.Composition(("owl", "key"), "red", "small", "pair")
    chosen = [*emoji.compositions(False, ["owl"])[:4], pair]
    mean = np.arange(5, dtype=np.float32)[:, None, None, None] * np.ones((5, 8, 8, 16), np.float32)
    made = latents.Latents(chosen, mean, mean, scale=2.0, shift=1.0)
    ids = np.arange(6)[:, None, None] * np.ones((6, 3, 7), np.int32)  # the number of the picture; 5 is empty
    batch = flow.flow_batches(made, ids, ids, 400, seed=0, rank=0)(3)
    numbers = np.array(batch["clip"])[:, 0]
    empty = numbers == 5
    assert 0.05 < empty.mean() < 0.17
    assert np.array_equal(np.array(batch["t5"])[:, 0], numbers)
    assert np.allclose(np.array(batch["latents"])[~empty, 0, 0, 0], (numbers[~empty] - 1) * 2)


def test_captions_are_tokenized_picture_by_picture(tmp_path):
    vocabularies.save_clip(*vocabularies.train_clip(TEXTS, 100), tmp_path)
    vocabularies.train_t5(TEXTS * 20, 120, tmp_path / "spiece.model")
    clip, t5 = CLIPTokenizer.from_folder(tmp_path), T5Tokenizer.from_folder(tmp_path, 20)
    chosen = emoji.compositions(False, ["owl", "grapes"])[:40]
    clip_ids, t5_ids = flow.tokenize(chosen, clip, t5)
    texts = emoji.captions(chosen[7])
    for k in range(t5_ids.shape[1]):
        text = texts[k % len(texts)]
        assert t5_ids[7, k].tolist() == t5.encode(text)
        length = clip_ids.shape[2]
        assert clip_ids[7, k].tolist() == clip.encode(text)[:length]
        assert clip.eos_token_id in clip_ids[7, k]
    assert t5_ids[-1, -1].tolist() == t5.encode("")


# --- trainings ---


def test_autoencoder_trains():
    mx.random.seed(0)
    model = AutoEncoder(recipe.AUTOENCODER)
    rng = np.random.default_rng(0)
    flat = rng.integers(0, 255, (4, 1, 1, 3), np.uint8) * np.ones((4, 16, 16, 3), np.uint8)
    rate = warmup_decay(0.02, 30, 2, 1.0)
    loss = lambda model, batch, key: autoencoder.autoencoder_loss(model, batch, key, 1.0, 1e-4)  # noqa: E731
    values = []
    trainer = Trainer(model, loss, lambda step: mx.array(flat), muon(rate, rate, autoencoder.is_edge))
    trainer.run(15, (Log(lambda trainer, means, seconds: values.append(means["mse"])),))
    assert values[-1] < 0.5 * values[0]


def test_flow_trains_all_of_its_networks():
    mx.random.seed(0)
    model = flow.TextToLatent(40, 30, end=39)
    before = {name: np.array(p) for name, p in tree_flatten(model.parameters())}
    batch = {
        "latents": mx.random.normal((4, 8, 8, 16)),
        "clip": mx.array([[38, i, i + 1, 39] for i in range(4)]),
        "t5": mx.array([[i, i + 3, 1] for i in range(4)]),
    }
    rate = warmup_decay(0.01, 30, 2, 1.0)
    optimizer, values = muon(rate, rate, flow.is_edge), []
    trainer = Trainer(model, flow.flow_loss, lambda step: batch, optimizer, ema=EMA(model, 0.9))
    trainer.run(8, (Log(lambda trainer, means, seconds: values.append(means["loss"])),))
    assert values[-1] < 0.8 * values[0]
    still = [n for n, p in tree_flatten(model.parameters()) if np.array_equal(before[n], np.array(p))]
    assert not [name for name in still if "k_proj.bias" not in name], still  # softmax does not see that bias


def test_guidance_of_the_loss_reaches_the_network_and_times_lie_in_0_to_1():
    seen = {}

    class Spy:
        def __call__(self, x, clip_ids, t5_ids, times, guidance):
            seen.update(times=np.array(times), guidance=np.array(guidance))
            return mx.zeros_like(x)

    batch = {"latents": mx.zeros((64, 8, 8, 16)), "clip": mx.zeros((64, 3)), "t5": mx.zeros((64, 3))}
    loss, _ = flow.flow_loss(Spy(), batch, mx.random.key(1))
    assert loss.item() == pytest.approx(1, abs=0.05)  # the noise's own variance: latents and prediction are 0
    assert 0 < seen["times"].min() < seen["times"].max() < 1
    assert 0 <= seen["guidance"].min() < 1 and seen["guidance"].max() > 4  # noqa: PT018
    rounded = (mx.array(1000 * seen["times"][:32]).astype(mx.bfloat16).astype(mx.float32)) / 1000
    assert np.allclose(rounded, seen["times"][:32], rtol=1e-5)


def test_load_state_takes_parameters_or_their_average(tmp_path: Path):
    mx.random.seed(0)
    model = flow.TextToLatent(40, 30, end=39)
    ema = EMA(model)
    ema.state["average"]["flow"]["img_in"]["bias"] = mx.full((192,), 7.0)
    trainer = Trainer(model, flow.flow_loss, lambda step: None, muon(*[warmup_decay(1, 2, 1)] * 2), ema=ema)
    trainer.save(tmp_path / "flow.safetensors")
    for tree, expected in (("model", np.array(model.flow.img_in.bias)), ("ema.average", np.full(192, 7.0))):
        other = flow.TextToLatent(40, 30, end=39)
        load_state(other, tmp_path / "flow.safetensors", tree)
        assert np.array_equal(np.array(other.flow.img_in.bias), expected)
