"""Optimizers and learning rates of the trainings here."""

import math
from collections.abc import Callable

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map

from flux.errors import FluxError

Schedule = Callable[[mx.array], mx.array]  # step -> learning rate

OPTIMIZERS = ("adam", "adamw", "adafactor", "lion", "prodigy")
SCHEDULES = ("constant", "linear", "cosine", "cosine_with_restarts")


def make(name: str, rate: Schedule, weight_decay: float = 0.0) -> optim.Optimizer:
    """An optimizer by its name in OPTIMIZERS, with the settings of its paper.

    Prodigy finds its step size itself: its rate is a factor of that, 1 as a rule. Weight decay is decoupled
    from the gradient; adam has none. FluxError for another name or a decay that cannot be.
    """
    if name not in OPTIMIZERS:
        raise FluxError(f"no optimizer {name!r}: choose {', '.join(OPTIMIZERS)}")
    if weight_decay < 0 or (weight_decay and name == "adam"):
        which = "0, adam has none: choose adamw" if name == "adam" else "0 or more"
        raise FluxError(f"weight decay {weight_decay}: give {which}")
    if name == "adam":
        return optim.Adam(rate, bias_correction=True)
    if name == "adamw":
        return optim.AdamW(rate, weight_decay=weight_decay, bias_correction=True)
    if name == "adafactor":  # with a rate of its own and not scaled by it, as it is used for fine-tuning
        return optim.Adafactor(rate, weight_decay=weight_decay, scale_parameter=False, relative_step=False)
    if name == "lion":
        return optim.Lion(rate, weight_decay=weight_decay)
    return Prodigy(rate, weight_decay=weight_decay)


def schedule(name: str, peak: float, updates: int, warmup: int = 0, restarts: int = 1) -> Schedule:
    """The learning rate of update 0, 1, ... of `updates`: 0 to `peak` in `warmup` updates, then by its name.

    constant stays; linear and cosine fall to 0 over all that is left, cosine_with_restarts does so `restarts`
    times. Where an epoch has several batches to an update, count the updates. The formulas are
    transformers' and diffusers'. FluxError for another name or numbers that make no schedule.
    """
    if name not in SCHEDULES:
        raise FluxError(f"no schedule {name!r}: choose {', '.join(SCHEDULES)}")
    if updates < 1 or not 0 <= warmup < updates:
        raise FluxError(f"a warm-up of {warmup} in {updates} updates: give 0 to {max(0, updates - 1)}")
    if restarts < 1:
        raise FluxError(f"{restarts} restarts of a schedule: give 1 or more")
    cycles = restarts if name == "cosine_with_restarts" else 1
    rest = updates - warmup

    def rate(step: mx.array) -> mx.array:
        step = mx.array(step).astype(mx.int32)  # MLX counts unsigned: a difference could not be negative
        done = mx.clip(step - warmup, 0, rest)
        # In whole numbers, so that a restart falls on its update and not on the one after it.
        share = mx.where(done < rest, (done * cycles) % rest / rest, 1.0)
        if name == "constant":
            factor = mx.array(1.0)
        elif name == "linear":
            factor = 1 - share
        else:
            factor = 0.5 * (1 + mx.cos(math.pi * share))
        return peak * mx.where(step < warmup, step / max(1, warmup), factor)

    return rate


class Prodigy(optim.Optimizer):
    """Adam that finds its step size d by itself (Mishchenko & Defazio 2023, arXiv:2306.06101, algorithm 4).

    d is one number for all parameters: it grows with the way that they have come from their first values.
    The same as the package prodigyopt with its defaults. A parameter that begins as zeros, as a LoRA's up
    weights do, has one zero for its first values.
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bias_correction: bool = False,
        d0: float = 1e-6,
    ):
        super().__init__()
        self._maybe_schedule("learning_rate", learning_rate)
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay
        self.bias_correction = bias_correction
        self.d0 = d0
        # d, the running numerator of its estimate, and the number of updates that have moved anything
        self.state["prodigy"] = {"d": mx.array(d0), "numerator": mx.array(0.0), "updates": mx.array(0.0)}

    def init_single(self, parameter: mx.array, state: dict) -> None:
        state["m"] = mx.zeros_like(parameter)
        state["v"] = mx.zeros_like(parameter)
        state["s"] = mx.zeros_like(parameter)
        state["first"] = mx.array(parameter) if parameter.any() else mx.array(0, parameter.dtype)

    def apply_gradients(self, gradients: dict, parameters: dict) -> dict:
        """All gradients first give d, then every parameter moves by it."""
        if not self._initialized:
            self.init(tree_map(lambda _, p: p, gradients, parameters))
        before = dict(self.state["prodigy"])
        terms = super().apply_gradients(gradients, parameters)  # of every parameter, by apply_single
        step_size = self._step_size(before)
        self.state["prodigy"] = self._estimate(before, sum(pair for _, pair in tree_flatten(terms)))
        moves = self.state["prodigy"]["updates"] > before["updates"]
        return tree_map(
            lambda g, p, state: self._moved(p, state, mx.where(moves, step_size, 0.0)),
            gradients,
            parameters,
            self.state,
        )

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        """Takes a gradient into the averages; returns its share of d's numerator and denominator, (2,)."""
        b1, b2 = self.betas
        b3 = math.sqrt(b2)
        d, size = self.state["prodigy"]["d"], self._step_size(self.state["prodigy"])
        moves = self.learning_rate > 0  # an update of rate 0 is as none: nothing fades either
        b1, b2, b3 = (mx.where(moves, b, 1.0) for b in (b1, b2, b3))
        state["m"] = b1 * state["m"] + (1 - b1) * d * gradient
        state["v"] = b2 * state["v"] + (1 - b2) * d * d * mx.square(gradient)
        state["s"] = b3 * state["s"] + (d / self.d0) * size * gradient
        numerator = (d / self.d0) * size * (gradient * (state["first"] - parameter)).sum()
        return mx.stack([numerator, mx.abs(state["s"]).sum()])

    def _step_size(self, prodigy: dict[str, mx.array]) -> mx.array:
        size = prodigy["d"] * self.learning_rate
        if self.bias_correction:
            (b1, b2), count = self.betas, prodigy["updates"] + 1
            size = size * mx.sqrt(1 - b2**count) / (1 - b1**count)
        return size

    def _estimate(self, before: dict[str, mx.array], terms: mx.array) -> dict[str, mx.array]:
        """The state after this update; as before where its rate or all gradients so far are zero."""
        numerator = math.sqrt(self.betas[1]) * before["numerator"] + terms[0]
        moves = (self.learning_rate > 0) & (terms[1] > 0)
        d = mx.maximum(before["d"], numerator / mx.where(moves, terms[1], 1.0))
        after = {"d": d, "numerator": numerator, "updates": before["updates"] + 1}
        return {name: mx.where(moves, value, before[name]) for name, value in after.items()}

    def _moved(self, parameter: mx.array, state: dict, size: mx.array) -> mx.array:
        denominator = mx.sqrt(state["v"]) + self.state["prodigy"]["d"] * self.eps
        return parameter * (1 - self.weight_decay * size) - size * state["m"] / denominator


def warmup_decay(peak: float, steps: int, warmup: int, hold: float = 0.0) -> Schedule:
    """Linear from 0 to `peak` in `warmup` steps, constant for the share `hold` of the rest, linear to 0."""
    start = warmup + hold * (steps - warmup)

    def rate(step: mx.array) -> mx.array:
        up = (step + 1) / warmup
        down = (steps - step) / (steps - start)
        return peak * mx.clip(mx.minimum(up, down), 0, 1)

    return rate


class GramMuon(optim.Muon):
    """Muon whose Newton-Schulz iteration runs on X X^T, (m, m), and meets X itself, (m, n), only twice.

    Every step multiplies X by a polynomial of X X^T, and all those commute: the same result for a quarter of
    the arithmetic where n is much larger than m.
    """

    def _zeropower_via_newtonschulz5(self, X: mx.array, steps: int) -> mx.array:
        m, n = min(X.shape), max(X.shape)
        if n < 2 * m:
            return super()._zeropower_via_newtonschulz5(X, steps)
        wide = X.T if X.shape[0] > X.shape[1] else X  # (m, n)
        wide = wide / (mx.linalg.norm(wide) + 1e-7)
        a, b, c = 3.4445, -4.7750, 2.0315
        gram, product = wide @ wide.T, mx.eye(m, dtype=X.dtype)
        for _ in range(steps):
            factor = a * mx.eye(m, dtype=X.dtype) + b * gram + c * (gram @ gram)
            product = factor @ product
            gram = factor @ gram @ factor
        orthogonal = product @ wide
        return orthogonal.T if X.shape[0] > X.shape[1] else orthogonal


def muon(
    rate: Schedule, adam_rate: Schedule, is_other: Callable[[str, mx.array], bool] = lambda *_: False
) -> optim.Optimizer:
    """Muon for matrices and convolutions, AdamW for vectors and for whatever `is_other(name, array)` names.

    Muon (Jordan, 2024, https://kellerjordan.github.io/posts/muon) makes every step a matrix with singular
    values near one; embeddings and the layers next to the pixels are no good for it.
    """
    adam = optim.AdamW(adam_rate, betas=[0.9, 0.98], weight_decay=0.0, bias_correction=True)
    rest = GramMuon(rate, momentum=0.95, weight_decay=0.0)
    return optim.MultiOptimizer([adam, rest], [lambda name, p: p.ndim < 2 or is_other(name, p)])
