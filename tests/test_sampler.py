"""Times, noise, packing and the solver, against their definitions."""

import math

import mlx.core as mx
import numpy as np
import pytest

from flux import sampler, solvers
from flux.errors import FluxError
from flux.noise import randn


def test_times_without_shift_are_even():
    assert sampler.timesteps(4, 4096, shift=False) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert sampler.timesteps(1, 16, shift=False) == [1.0, 0.0]


@pytest.mark.parametrize(("tokens", "mu"), [(256, 0.5), (4096, 1.15), (2176, 0.825), (16, 0.459375)])
def test_shift_follows_its_formula(tokens, mu):
    times = sampler.timesteps(10, tokens, shift=True)
    even = np.linspace(1, 0, 11)[1:-1]
    expected = [1 / (1 + math.exp(-mu) * (1 / t - 1)) for t in even]
    assert times[0] == 1
    assert times[-1] == 0
    np.testing.assert_allclose(times[1:-1], expected, rtol=1e-6)


@pytest.mark.parametrize("steps", [0, -3])
def test_bad_step_count(steps):
    with pytest.raises(FluxError, match=f"steps.*{steps}"):
        sampler.timesteps(steps, 256, shift=False)


def test_noise_of_a_picture_depends_on_its_seed_alone():
    batch = sampler.noise([7, 8, 2**64 - 1, 7], (4, 6), 16)
    assert batch.shape == (4, 4, 6, 16)
    assert batch.dtype == mx.float32
    for i, seed in enumerate([7, 8, 2**64 - 1, 7]):
        assert mx.array_equal(batch[i], sampler.noise([seed], (4, 6), 16)[0])
    assert mx.abs(batch[0] - batch[1]).max() > 0.1


def test_noise_ignores_and_leaves_the_global_state():
    mx.random.seed(3)
    first = sampler.noise([5], (8, 8), 16)
    after = mx.random.normal((4,))
    mx.random.seed(3)
    assert mx.array_equal(after, mx.random.normal((4,)))
    assert mx.array_equal(first, sampler.noise([5], (8, 8), 16))


def test_noise_is_standard_normal():
    x = np.array(sampler.noise(range(4), (64, 64), 16)).astype(np.float64)
    assert abs(x.mean()) < 0.01
    assert abs(x.std() - 1) < 0.01
    assert abs((x**4).mean() - 3) < 0.1


def test_torch_noise_of_a_picture_depends_on_its_seed_alone():
    batch = sampler.noise([7, 2**64 - 1], (4, 6), 16, "torch")
    assert batch.shape == (2, 4, 6, 16)
    assert mx.array_equal(batch[1], sampler.noise([2**64 - 1], (4, 6), 16, "torch")[0])
    channels_first = randn(7, 16 * 4 * 6).reshape(16, 4, 6)
    assert np.array_equal(np.array(batch[0]), channels_first.transpose(1, 2, 0))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_diffusers_noise_is_torchs_in_the_working_type(dtype):
    expected = sampler.noise([7], (4, 6), 16, "torch").astype(dtype)
    made = sampler.noise([7], (4, 6), 16, "diffusers", dtype)
    assert made.dtype == mx.float32
    assert mx.array_equal(made, expected.astype(mx.float32))


def test_unknown_noise():
    with pytest.raises(FluxError, match=r"mlx, torch, diffusers, not 'numpy'"):
        sampler.noise([1], (4, 4), 16, "numpy")


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_bad_seed(seed):
    with pytest.raises(FluxError, match="seed"):
        sampler.noise([seed], (4, 4), 16)


def test_pack_puts_a_patch_into_a_token_channels_first():
    latent = mx.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    tokens = sampler.pack(latent)
    assert tokens.shape == (2, 6, 12)
    for token, (row, column) in enumerate((r, c) for r in range(2) for c in range(3)):
        patch = latent[1, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]  # (2, 2, C)
        assert tokens[1, token].tolist() == patch.transpose(2, 0, 1).flatten().tolist()


@pytest.mark.parametrize("size", [(2, 2), (4, 6), (6, 4), (64, 32)])
def test_unpack_undoes_pack(size):
    latent = mx.random.normal((2, *size, 16))
    assert mx.array_equal(sampler.unpack(sampler.pack(latent), size), latent)


def test_pack_and_unpack_refuse_what_does_not_fit():
    with pytest.raises(FluxError, match="5x4"):
        sampler.pack(mx.zeros((1, 5, 4, 16)))
    with pytest.raises(FluxError, match="4x6"):
        sampler.unpack(mx.zeros((1, 4, 64)), (4, 6))


def test_positions_go_row_by_row_in_the_order_of_pack():
    positions = sampler.image_positions((4, 6))
    assert positions.shape == (1, 6, 3)
    assert positions.dtype == mx.int32
    assert positions[0].tolist() == [[0, r, c] for r in range(2) for c in range(3)]
    assert sampler.image_positions((2, 4), index=1)[0].tolist() == [[1, 0, 0], [1, 0, 1]]
    assert sampler.text_positions(3).tolist() == [[[0, 0, 0]] * 3]


def test_guidance_interpolates_and_extrapolates():
    positive, negative = mx.array([3.0]), mx.array([1.0])
    assert [sampler.guide(positive, negative, s).item() for s in (0, 1, 2.5)] == [1, 3, 6]


def test_euler_follows_a_straight_path_exactly():
    x0, eps = mx.random.normal((2, 6, 64)), mx.random.normal((2, 6, 64))
    times = sampler.timesteps(5, 6, shift=True)
    path = list(solvers.euler(lambda x, i: eps - x0, eps, times))
    assert len(path) == 5
    for x, t in zip(path, times[1:], strict=True):
        assert mx.allclose(x, (1 - t) * x0 + t * eps, atol=1e-5)


def test_euler_hands_over_float32_and_the_step():
    seen = []

    def predict(x, i):
        seen.append((i, x.dtype))
        return mx.ones_like(x).astype(mx.bfloat16)

    path = list(solvers.euler(predict, mx.zeros((1, 2, 4), dtype=mx.float16), [1.0, 0.7, 0.0]))
    assert seen == [(0, mx.float32), (1, mx.float32)]
    assert all(x.dtype == mx.float32 for x in path)
    assert mx.allclose(path[0], mx.full((1, 2, 4), -0.3))
