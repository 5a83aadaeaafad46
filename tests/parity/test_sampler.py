"""Times, solver and packing against diffusers' FluxPipeline and its scheduler."""

import mlx.core as mx
import numpy as np
import pytest

from flux import sampler, solvers

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline, calculate_shift  # noqa: E402


def scheduler(num_steps: int, image_tokens: int, shift: bool):
    """diffusers' scheduler, set as its FluxPipeline sets it for schnell (no shift) and dev."""
    made = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=shift, shift=3.0 if shift else 1.0)
    sigmas = np.linspace(1.0, 1 / num_steps, num_steps)
    made.set_timesteps(num_steps, sigmas=sigmas, mu=calculate_shift(image_tokens))
    return made


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 20, 28, 50])
@pytest.mark.parametrize("tokens", [16, 256, 512, 1008, 4096, 16384])
def test_times_are_diffusers_to_the_bit(steps, tokens, shift):
    assert sampler.timesteps(steps, tokens, shift) == scheduler(steps, tokens, shift).sigmas.tolist()


@pytest.mark.parametrize("steps", [1, 4, 20, 28])
@pytest.mark.parametrize("tokens", [16, 1008, 4096, 16384])
@pytest.mark.parametrize(
    ("config", "shift"),
    [
        ({"shift": 3.0}, 3.0),
        ({"shift": 1.7}, 1.7),
        (
            {
                "use_dynamic_shifting": True, "base_shift": 0.3, "max_shift": 1.9,
                "base_image_seq_len": 64, "max_image_seq_len": 9000,
            },
            sampler.Shift(0.3, 1.9, 64, 9000),
        ),
    ],
)  # fmt: skip
def test_other_shifts_are_diffusers_to_the_bit(steps, tokens, config, shift):
    made = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    c = made.config
    points = (c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift)
    sigmas = np.linspace(1.0, 1 / steps, steps)
    made.set_timesteps(steps, sigmas=sigmas, mu=calculate_shift(tokens, *points))
    assert sampler.timesteps(steps, tokens, shift) == made.sigmas.tolist()


@pytest.mark.parametrize("shift", [False, True])
def test_euler_steps_are_diffusers(shift):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 24, 64)).astype(np.float32)
    predictions = rng.normal(size=(6, 2, 24, 64)).astype(np.float32)
    reference = scheduler(6, 24, shift)
    expected = torch.from_numpy(x)
    path = solvers.euler(lambda x, i: mx.array(predictions[i]), mx.array(x), sampler.timesteps(6, 24, shift))
    for ours, t, prediction in zip(path, reference.timesteps, predictions, strict=True):
        expected = reference.step(torch.from_numpy(prediction), t, expected).prev_sample
        np.testing.assert_allclose(np.array(ours), expected.numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("h", "w"), [(8, 8), (4, 12), (32, 64)])
def test_packing_and_positions_are_diffusers(h, w):
    latent = np.random.default_rng(1).normal(size=(2, h, w, 16)).astype(np.float32)
    nchw = torch.from_numpy(latent.transpose(0, 3, 1, 2).copy())
    packed = FluxPipeline._pack_latents(nchw, 2, 16, h, w)
    assert np.array_equal(np.array(sampler.pack(mx.array(latent))), packed.numpy())
    unpacked = FluxPipeline._unpack_latents(packed, 8 * h, 8 * w, 8)
    ours = sampler.unpack(mx.array(packed.numpy()), (h, w))
    assert np.array_equal(np.array(ours), unpacked.permute(0, 2, 3, 1))
    ids = FluxPipeline._prepare_latent_image_ids(2, h // 2, w // 2, "cpu", torch.float32)
    assert np.array_equal(np.array(sampler.image_positions((h, w)))[0], ids.numpy())
