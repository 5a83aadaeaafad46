"""The autoencoder by itself: names, exactness of its parts, memory, types."""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from flux.models import autoencoder
from flux.models.autoencoder import AttnBlock, AutoEncoder, AutoEncoderParams, GroupNorm, in_tiles

SMALL = AutoEncoderParams(ch=8, ch_mult=(1, 2), num_res_blocks=1, z_channels=4, norm_groups=4)


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every one-dimensional parameter, norms' weights and biases, becomes random."""
    mx.random.seed(seed)
    shaken = [
        (k, v + 0.3 * mx.random.normal(v.shape)) for k, v in tree_flatten(module.parameters()) if v.ndim == 1
    ]
    module.load_weights(shaken, strict=False)
    mx.eval(module.parameters())
    return module


def small_network() -> AutoEncoder:
    """Random, with its attention in chunks, so that the memory it takes is that of the other layers."""
    network = randomize(AutoEncoder(SMALL))
    network.encoder.mid.attn_1.scores_memory = network.decoder.mid.attn_1.scores_memory = 2**21
    return network


def relative_error(ours: mx.array, expected: np.ndarray | mx.array) -> float:
    ours, expected = np.array(ours.astype(mx.float32), np.float64), np.array(expected, np.float64)
    return float(np.linalg.norm(ours - expected) / np.linalg.norm(expected))


def peak_memory(f, *arguments) -> int:
    """Bytes that an evaluation needs beside what is there already."""
    mx.eval(arguments)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(f(*arguments))
    return mx.get_peak_memory() - before


def test_full_size_names_and_shapes_are_the_checkpoint_s():
    expected = json.loads((Path(__file__).parent / "reference" / "ae.bfl.json").read_text())
    before = mx.get_active_memory()
    network = AutoEncoder(AutoEncoderParams())
    shapes = {}
    for name, tensor in tree_flatten(network.parameters()):
        if tensor.ndim == 4:  # a checkpoint has (O, I, H, W)
            o, h, w, i = tensor.shape
            shapes[name] = [o, i, h, w]
        elif tensor.ndim == 2:
            shapes[name] = [*tensor.shape, 1, 1]
        else:
            shapes[name] = list(tensor.shape)
    assert shapes == expected
    assert mx.get_active_memory() - before < 2**20  # nothing of the 335 MB was made


@pytest.mark.parametrize("size", [16, 64, 256, 768])
@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_group_norm_stays_as_exact_as_float32_allows_for_large_pictures(size, offset):
    x = np.random.default_rng(size).standard_normal((1, size, size + 8, 8)).astype(np.float32) + np.float32(
        offset
    )
    norm = randomize(GroupNorm(groups=2, channels=8))
    grouped = x.astype(np.float64).reshape(1, -1, 2, 4)
    centred = grouped - grouped.mean((1, 3), keepdims=True)
    normal = (centred / np.sqrt((centred**2).mean((1, 3), keepdims=True) + 1e-6)).reshape(x.shape)
    expected = normal * np.array(norm.weight, np.float64) + np.array(norm.bias, np.float64)
    assert relative_error(norm(mx.array(x)), expected) < (2e-7 if offset == 0 else 6e-7)


def test_group_norm_has_the_gradients_of_its_definition():
    norm = randomize(GroupNorm(groups=4, channels=12))
    x, target = mx.random.normal((2, 5, 7, 12)) + 1, mx.random.normal((2, 5, 7, 12))

    def definition(x, weight, bias):
        g = x.reshape(2, 35, 4, 3)
        g = (g - g.mean(axis=(1, 3), keepdims=True)) / mx.sqrt(g.var(axis=(1, 3), keepdims=True) + 1e-6)
        return (g.reshape(x.shape) * weight + bias - target).square().sum()

    def ours(x, weight, bias):
        norm.weight, norm.bias = weight, bias
        return (norm(x) - target).square().sum()

    arguments = (x, norm.weight, norm.bias)
    expected = mx.grad(definition, argnums=(0, 1, 2))(*arguments)
    for gradient, reference in zip(mx.grad(ours, argnums=(0, 1, 2))(*arguments), expected, strict=True):
        assert relative_error(gradient, reference) < 1e-5


def test_attention_in_chunks_equals_the_whole_and_bounds_memory():
    x = mx.random.normal((2, 32, 40, 16))
    whole = randomize(AttnBlock(16, groups=4))
    scores = 2 * 1280 * 1280 * 4
    chunked = randomize(AttnBlock(16, groups=4, scores_memory=scores // 10 - 20_000))  # 10 and a short one
    chunked.update(whole.parameters())
    assert relative_error(chunked(x), whole(x)) < 1e-6
    assert peak_memory(whole, x) > scores
    assert peak_memory(chunked, x) < 0.3 * scores


@pytest.mark.parametrize(
    ("height", "width", "side"), [(64, 40, 32), (33, 70, 32), (20, 100, 48), (16, 24, 32)]
)
def test_tiles_of_a_local_function_give_it_back(height, width, side):
    x = mx.random.normal((1, height, width, 3))
    doubled = mx.repeat(mx.repeat(x, 2, axis=1), 2, axis=2)
    grown = in_tiles(lambda t: mx.repeat(mx.repeat(t, 2, axis=1), 2, axis=2), x, side, step_in=1, step_out=2)
    assert relative_error(grown, doubled) < 1e-6
    shrunk = in_tiles(lambda t: t[:, ::2, ::2], doubled, side, step_in=2, step_out=1)
    assert relative_error(shrunk, x) < 1e-6


def test_a_small_budget_decodes_and_encodes_in_tiles_close_to_the_whole_in_less_memory(monkeypatch):
    monkeypatch.setattr(autoencoder, "MIN_TILE", 20)
    network = small_network()
    z = mx.random.normal((1, 48, 40, 4))
    whole = network.decode(z)
    assert whole.shape == (1, 96, 80, 3)
    assert relative_error(network.decode(z, memory=0), whole) < 0.1
    assert peak_memory(lambda z: network.decode(z, memory=0), z) < 0.6 * peak_memory(network.decode, z)
    x = mx.random.uniform(-1, 1, (1, 96, 80, 3))
    assert relative_error(network.encode(x, memory=0), network.encode(x)) < 0.1
    assert peak_memory(lambda x: network.encode(x, memory=0), x) < 0.8 * peak_memory(network.encode, x)


def test_a_batch_too_large_together_is_decoded_one_by_one_the_same():
    network = small_network()
    z = mx.random.normal((3, 40, 24, 4))
    one_picture = 19 * 2 * SMALL.ch * 4 * (80 * 48)
    assert relative_error(network.decode(z, memory=one_picture), network.decode(z)) < 1e-6


def test_whole_decode_takes_about_the_memory_that_the_budget_assumes():
    network = randomize(AutoEncoder(AutoEncoderParams(ch=16, norm_groups=8)))
    for rows, columns in [(16, 12), (8, 40)]:
        assumed = 19 * 2 * 16 * 4 * (8 * rows * 8 * columns)
        assert (
            0.6 * assumed
            < peak_memory(network.decode, mx.random.normal((1, rows, columns, 16)))
            < 1.2 * assumed
        )


def test_encode_gives_the_mean_or_a_sample_by_noise_of_the_latent_s_shape():
    network = randomize(AutoEncoder(SMALL))
    x, noise = mx.random.uniform(-1, 1, (2, 24, 16, 3)), mx.random.normal((2, 12, 8, 4))
    mean, logvar = network.moments(x)
    assert mean.shape == logvar.shape == noise.shape
    scaled = (np.array(mean) - SMALL.shift_factor) * SMALL.scale_factor
    assert relative_error(network.encode(x), scaled) < 1e-6
    spread = np.exp(np.array(logvar) / 2) * SMALL.scale_factor
    assert relative_error(network.encode(x, noise), scaled + spread * np.array(noise)) < 1e-6


@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.float16, 5e-3), (mx.bfloat16, 4e-2)])
def test_weights_of_16_bits(dtype, tolerance):
    network = randomize(AutoEncoder(SMALL))
    x, z = mx.random.uniform(-1, 1, (1, 16, 24, 3)), mx.random.normal((1, 8, 12, 4))
    latent, picture = network.encode(x), network.decode(z)
    mx.eval(latent, picture)
    network.set_dtype(dtype)
    for ours, exact in ((network.encode(x), latent), (network.decode(z), picture)):
        assert ours.dtype == dtype
        assert relative_error(ours, exact) < tolerance


def test_gradients_reach_every_parameter():
    network = randomize(AutoEncoder(SMALL))
    x, noise = mx.random.uniform(-1, 1, (2, 16, 16, 3)), mx.random.normal((2, 8, 8, 4))

    def loss(network):
        return (network.decode(network.encode(x, noise)) - x).square().mean()

    gradients = tree_flatten(nn.value_and_grad(network, loss)(network)[1])
    still = [name for name, gradient in gradients if not (gradient.abs().max().item() > 0)]
    # A key's bias moves all scores of a query alike, which softmax does not see.
    assert [name for name in still if not name.endswith("attn_1.k.bias")] == []


def test_budget_constants_allow_a_tile():
    assert autoencoder.MIN_TILE > 2 * autoencoder.OVERLAP
