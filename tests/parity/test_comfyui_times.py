"""ComfyUI's times, from its formulas written with PyTorch."""

import math

import numpy as np
import pytest

from flux import sampler

torch = pytest.importorskip("torch")


def table(factor: float | None):
    if factor is None:
        return torch.arange(1, 1001) / 1000
    return factor / (factor + (1 / (torch.arange(1, 10001) / 10000) - 1))


def reference(schedule: str, steps: int, factor: float | None) -> list[float]:
    sigmas = table(factor)
    if schedule == "simple":
        stride = len(sigmas) / steps
        return [float(sigmas[-(1 + int(i * stride))]) for i in range(steps)] + [0.0]
    if schedule == "karras":
        ramp, ends = torch.linspace(0, 1, steps), [float(sigmas[i]) ** (1 / 7) for i in (-1, 0)]
        return [*((ends[0] + ramp * (ends[1] - ends[0])) ** 7).tolist(), 0.0]
    if schedule == "beta":
        scipy = pytest.importorskip("scipy.stats")
        quantiles = scipy.beta.ppf(1 - np.linspace(0, 1, steps, endpoint=False), 0.6, 0.6)
        return [*(float(sigmas[int(i)]) for i in np.rint(quantiles * (len(sigmas) - 1))), 0.0]
    if schedule == "sgm_uniform":
        times = torch.linspace(float(sigmas[-1]), float(sigmas[0]), steps + 1)[:-1]
    else:
        times = torch.linspace(float(sigmas[-1]), float(sigmas[0]), steps)
    times = times if factor is None else factor / (factor + (1 / times - 1))
    return [*times.tolist(), 0.0]


@pytest.mark.parametrize("schedule", sampler.COMFYUI_SCHEDULES)
@pytest.mark.parametrize("factor", [None, math.exp(1.15), math.exp(0.8), 3.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 20, 28, 30, 50])
def test_times_are_comfyuis(schedule, factor, steps):
    ours, expected = sampler.comfyui_times(schedule, steps, factor), reference(schedule, steps, factor)
    assert len(ours) == steps + 1
    if schedule in ("simple", "beta"):
        assert ours == expected  # to the bit
    assert ours == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize("steps", [4, 10, 20, 25])
def test_simple_times_are_the_models_own_where_the_table_has_them(steps):
    """20 steps of dev with the shift that its size asks for; 28 are not in the table."""
    factor = sampler.time_shift(1024)
    assert sampler.comfyui_times("simple", steps, factor) == pytest.approx(
        sampler.timesteps(steps, 1024, shift=True), rel=1e-6
    )
    assert sampler.comfyui_times("simple", 28, factor) != pytest.approx(
        sampler.timesteps(28, 1024, shift=True), rel=1e-5
    )
