"""Solvers against diffusers' schedulers, with a velocity field that is known."""

import flux  # noqa: F401

# isort: split
import mlx.core as mx
import numpy as np
import pytest

from flux import solvers

diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")

TIMES = [1.0, 0.93, 0.8, 0.71, 0.5, 0.32, 0.11, 0.0]


def field(x, t):
    """A velocity that bends, of numpy arrays or torch tensors."""
    return 0.7 * x * x / (1 + x * x) + x * (1.3 - t) + 0.5 * t * t


def ours(name: str, x: np.ndarray, times=TIMES) -> list[np.ndarray]:
    steps = solvers.SOLVERS[name](lambda x, i: field(x, times[i]), mx.array(x), times, solvers.unchanged)
    return [np.array(x) for x in steps]


def theirs(scheduler, x: np.ndarray, times=TIMES) -> list[np.ndarray]:
    """x after each step of a diffusers scheduler that is given the times as they are, in float64."""
    scheduler.set_timesteps(len(times) - 1)
    sigmas = torch.tensor(times, dtype=torch.float64)
    sigmas[0] = solvers.LAST_NOISE
    scheduler.sigmas, scheduler.timesteps = sigmas, sigmas[:-1] * 1000
    sample, found = torch.tensor(x, dtype=torch.float64), []
    for i, t in enumerate(scheduler.timesteps):
        sample = scheduler.step(field(sample, times[i]), t, sample).prev_sample
        found.append(sample.numpy())
    return found


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        (
            "dpmpp2m",
            {"cls": "DPMSolverMultistepScheduler", "solver_order": 2},
        ),
        ("unipc", {"cls": "UniPCMultistepScheduler", "solver_type": "bh2", "solver_order": 2}),
        ("euler", {"cls": "DPMSolverMultistepScheduler", "solver_order": 1}),
    ],
)
@pytest.mark.parametrize("shape", [(3, 5), (2, 7, 4)])
def test_steps_are_diffusers(name, scheduler, shape):
    x = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    options = dict(scheduler)
    made = getattr(diffusers, options.pop("cls"))(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        final_sigmas_type="zero",
        lower_order_final=True,
        **options,
    )
    for found, expected in zip(ours(name, x), theirs(made, x), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def test_heun_is_its_formula():
    x = np.random.default_rng(4).standard_normal((6,)).astype(np.float32)
    expected = x.astype(np.float64)
    for i in range(len(TIMES) - 2):
        dt = TIMES[i + 1] - TIMES[i]
        v = field(expected, TIMES[i])
        expected = expected + dt * (v + field(expected + dt * v, TIMES[i + 1])) / 2
    expected = expected - TIMES[-2] * field(expected, TIMES[-2])
    np.testing.assert_allclose(ours("heun", x)[-1], expected, rtol=1e-5)
