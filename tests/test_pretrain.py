"""Vocabularies trained on captions, and the losses of a training from nothing."""

import mlx.core as mx
import numpy as np
import pytest

from flux.recipes import emoji
from flux.tokenizers import CLIPTokenizer, T5Tokenizer
from flux.training import losses, vocabularies

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
