"""Solvers of dx/dt = v(x, t) from noise, t = 1, to a picture, t = 0. Pure functions of arrays.

Each is an iterator of x (float32) after each of the `len(times) - 1` steps, the last one the finished latent;
so evaluation, progress bars and previews are left to the caller's loop. `predict(x, i)` is the model's dx/dt
at x and times[i], in any type and of x's shape. `project(x, i)` is what x, at times[i + 1], becomes after
step i, such as x with a known part put back.

The multistep solvers work on the model's estimate of the picture, x_0 = x - t v, as a function of
lambda = log((1 - t) / t), half the logarithm of the signal-to-noise ratio. If x_0 were constant, a step would
be x' = r x + (1 - r) x_0, r = t' / t, which is Euler's step; they put in what x_0 is on the way.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import mlx.core as mx

Predict = Callable[[mx.array, int], mx.array]
Project = Callable[[mx.array, int], mx.array]
Solver = Callable[[Predict, mx.array, Sequence[float], Project], Iterator[mx.array]]

LAST_NOISE = 1 - 1e-6  # stands for t = 1, where lambda would be infinite; as in diffusers


def unchanged(x: mx.array, i: int) -> mx.array:
    """The `project` that changes nothing."""
    return x


def euler(
    predict: Predict, x: mx.array, times: Sequence[float], project: Project = unchanged
) -> Iterator[mx.array]:
    """First order, one evaluation a step."""
    x = x.astype(mx.float32)
    for i, (t, t_next) in enumerate(pairwise(times)):
        x = project(x + (t_next - t) * predict(x, i).astype(mx.float32), i)
        yield x


def heun(
    predict: Predict, x: mx.array, times: Sequence[float], project: Project = unchanged
) -> Iterator[mx.array]:
    """Second order, two evaluations a step but one in the last: the mean of v at both ends (Heun 1900)."""
    x = x.astype(mx.float32)
    for i, (t, t_next) in enumerate(pairwise(times)):
        v = predict(x, i).astype(mx.float32)
        if i + 2 < len(times):
            there = project(x + (t_next - t) * v, i)
            v = (v + predict(there, i + 1).astype(mx.float32)) / 2
        x = project(x + (t_next - t) * v, i)
        yield x


def dpmpp2m(
    predict: Predict, x: mx.array, times: Sequence[float], project: Project = unchanged
) -> Iterator[mx.array]:
    """DPM-Solver++(2M), one evaluation a step: x_0 goes on as it has changed (Lu et al. 2022, algorithm 2).

    The first step and the one to t = 0 are Euler's.
    """
    x = x.astype(mx.float32)
    before: mx.array | None = None
    for i, (t, t_next) in enumerate(pairwise(times)):
        picture = x - t * predict(x, i).astype(mx.float32)
        ratio = t_next / t
        x = project(ratio * x + (1 - ratio) * _extrapolated(picture, before, times, i), i)
        before = picture
        yield x


def unipc(
    predict: Predict, x: mx.array, times: Sequence[float], project: Project = unchanged
) -> Iterator[mx.array]:
    """UniPC of order 2, one evaluation a step: each also corrects the step before (Zhao et al. 2023, B_2).

    Its predictor is DPM-Solver++(2M)'s step.
    """
    x = x.astype(mx.float32)
    earlier: list[mx.array] = []  # x_0 at the steps before, the latest last
    start = x  # of the step before
    for i, (t, t_next) in enumerate(pairwise(times)):
        picture = x - t * predict(x, i).astype(mx.float32)
        if earlier:
            ratio = t / times[i - 1]
            x = project(ratio * start + (1 - ratio) * _corrected(picture, earlier, times, i - 1), i - 1)
        start, ratio = x, t_next / t
        before = earlier[-1] if earlier else None
        x = project(ratio * x + (1 - ratio) * _extrapolated(picture, before, times, i), i)
        earlier = [*earlier[-1:], picture]
        yield x


SOLVERS: dict[str, Solver] = {"euler": euler, "heun": heun, "dpmpp2m": dpmpp2m, "unipc": unipc}


def _lambda(t: float) -> float:
    t = min(t, LAST_NOISE)
    return math.log((1 - t) / t)


def _extrapolated(picture: mx.array, before: mx.array | None, times: Sequence[float], i: int) -> mx.array:
    """x_0 in the middle of step i, in lambda, from its values at times[i] and times[i - 1]."""
    if before is None or times[i + 1] == 0:
        return picture
    h, h_before = (_lambda(times[j + 1]) - _lambda(times[j]) for j in (i, i - 1))
    return picture + h / (2 * h_before) * (picture - before)


def _corrected(there: mx.array, earlier: Sequence[mx.array], times: Sequence[float], i: int) -> mx.array:
    """The weighted mean of x_0 over step i, from its values at the end of it, its start, and before.

    The weights solve UniPC's equations sum_k rho_k r_k^(n-1) = n! phi_(n+1) / B, n = 1, 2, where r are the
    places in lambda: 1 at the step's end, and -h_before / h.
    """
    picture = earlier[-1]
    h = _lambda(times[i + 1]) - _lambda(times[i])
    if len(earlier) == 1:
        return picture + 0.5 * (there - picture)
    place = -(_lambda(times[i]) - _lambda(times[i - 1])) / h
    whole = math.expm1(-h)
    phi_2 = whole / -h - 1
    phi_3 = phi_2 / -h - 0.5
    first, second = phi_2 / whole, 2 * phi_3 / whole
    rho_before = (second - first) / (place - 1)  # rho_before + rho_there = first, and with places, second
    rho_there = first - rho_before
    return picture + rho_before / place * (earlier[0] - picture) + rho_there * (there - picture)
