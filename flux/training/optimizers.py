"""Optimizers: by name, and as tables of a config."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_map

from flux.errors import FluxError
from flux.tables import option
from flux.training.schedules import Schedule
from flux.trees import named_arrays

DEFAULT_RATE = 1e-4

OPTIMIZERS = ("adam", "adamw", "adafactor", "lion", "prodigy")
BETAS = {**dict.fromkeys(OPTIMIZERS, (0.9, 0.999)), "lion": (0.9, 0.99)}
EPSILON = 1e-8


def make(
    name: str,
    rate: Schedule,
    weight_decay: float = 0.0,
    betas: tuple[float | None, float | None] = (None, None),
    epsilon: float | None = None,
) -> optim.Optimizer:
    """An optimizer by its name in OPTIMIZERS, with the settings of its paper where none are given.

    Prodigy finds its step size itself: its rate is a factor of that, 1 as a rule. Weight decay is decoupled
    from the gradient; adam has none. FluxError for another name or a decay that cannot be.
    """
    if name not in OPTIMIZERS:
        raise FluxError(f"no optimizer {name!r}: choose {', '.join(OPTIMIZERS)}")
    if weight_decay < 0 or (weight_decay and name == "adam"):
        which = "0, adam has none: choose adamw" if name == "adam" else "0 or more"
        raise FluxError(f"weight decay {weight_decay}: give {which}")
    beta1, beta2 = (own if beta is None else beta for own, beta in zip(BETAS[name], betas, strict=True))
    eps = EPSILON if epsilon is None else epsilon
    if name == "adam":
        return optim.Adam(rate, [beta1, beta2], eps, bias_correction=True)
    if name == "adamw":
        return optim.AdamW(rate, [beta1, beta2], eps, weight_decay, bias_correction=True)
    if name == "adafactor":  # with a rate of its own and not scaled by it, as it is used for fine-tuning
        return optim.Adafactor(rate, weight_decay=weight_decay, scale_parameter=False, relative_step=False)
    if name == "lion":
        return optim.Lion(rate, [beta1, beta2], weight_decay)
    return Prodigy(rate, (beta1, beta2), eps, weight_decay)


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
        """Fills the state of a parameter before its first update."""
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
        self.state["prodigy"] = self._estimate(
            before, reduce(mx.add, (pair for _, pair in named_arrays(terms)))
        )
        moves = self.state["prodigy"]["updates"] > before["updates"]
        return tree_map(
            lambda g, p, state: self._moved(p, state, mx.where(moves, step_size, 0.0)),
            gradients,
            parameters,
            self.state,
        )

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        """Takes a gradient into the averages; returns its share of d's numerator and denominator, (2,)."""
        d, size = self.state["prodigy"]["d"], self._step_size(self.state["prodigy"])
        moves = self.learning_rate > 0  # an update of rate 0 is as none: nothing fades either
        b1, b2 = (mx.where(moves, b, 1.0) for b in self.betas)
        b3 = mx.where(moves, math.sqrt(self.betas[1]), 1.0)
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


class MuonAndAdamW(optim.MultiOptimizer):
    """Muon for matrices and convolutions, AdamW for the rest. Its `learning_rate` is Muon's."""

    def __init__(
        self, adam: optim.AdamW, rest: GramMuon, is_other: Callable[[str, mx.array], bool], share: float = 1.0
    ):
        """share: of a learning rate that is set later, for AdamW."""
        super().__init__([adam, rest], [lambda name, p: p.ndim < 2 or is_other(name, p)])
        self._share = share

    @property
    def learning_rate(self) -> mx.array:
        """Muon's learning rate."""
        return self.optimizers[1].learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: float | mx.array) -> None:
        """Sets Muon's, and AdamW's in proportion."""
        self.optimizers[0].learning_rate = self._share * learning_rate
        self.optimizers[1].learning_rate = learning_rate


def muon(
    rate: float | Schedule,
    adam_rate: float | Schedule,
    is_other: Callable[[str, mx.array], bool] = lambda *_: False,
    share: float = 1.0,
) -> MuonAndAdamW:
    """Muon for matrices and convolutions, AdamW for vectors and for whatever `is_other(name, array)` names.

    Muon (Jordan, 2024, https://kellerjordan.github.io/posts/muon) makes every step a matrix with singular
    values near one; embeddings and the layers next to the pixels do not suit it.
    """
    adam = optim.AdamW(adam_rate, betas=[0.9, 0.98], weight_decay=0.0, bias_correction=True)
    return MuonAndAdamW(adam, GramMuon(rate, momentum=0.95, weight_decay=0.0), is_other, share)


# --- Tables of a config: each class has the keys of its table and builds from them ---


@dataclass(frozen=True)
class AdamW:
    """Loshchilov & Hutter 2017, arXiv:1711.05101."""

    lr: float | None = option(None, above=0)
    betas: tuple[float, float] = option((0.9, 0.999), least=0, below=1)
    eps: float = option(1e-8, above=0)
    weight_decay: float = option(0.01, least=0)

    def build(self, rate: float) -> optim.Optimizer:
        """The optimizer at this learning rate."""
        return optim.AdamW(rate, list(self.betas), self.eps, self.weight_decay, bias_correction=True)


@dataclass(frozen=True)
class Adam:
    """Kingma & Ba 2014, arXiv:1412.6980."""

    lr: float | None = option(None, above=0)
    betas: tuple[float, float] = option((0.9, 0.999), least=0, below=1)
    eps: float = option(1e-8, above=0)

    def build(self, rate: float) -> optim.Optimizer:
        """The optimizer at this learning rate."""
        return optim.Adam(rate, list(self.betas), self.eps, bias_correction=True)


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent, with momentum and weight decay."""

    lr: float | None = option(None, above=0)
    momentum: float = option(0.0, least=0, below=1)
    weight_decay: float = option(0.0, least=0)
    dampening: float = option(0.0, least=0, most=1)
    nesterov: bool = False

    def __post_init__(self) -> None:
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise FluxError("nesterov needs a momentum above 0 and no dampening")

    def build(self, rate: float) -> optim.Optimizer:
        """The optimizer at this learning rate."""
        return optim.SGD(rate, self.momentum, self.weight_decay, self.dampening, self.nesterov)


@dataclass(frozen=True)
class RMSprop:
    """Tieleman & Hinton 2012."""

    lr: float | None = option(None, above=0)
    alpha: float = option(0.99, least=0, most=1)
    eps: float = option(1e-8, above=0)

    def build(self, rate: float) -> optim.Optimizer:
        """The optimizer at this learning rate."""
        return optim.RMSprop(rate, self.alpha, self.eps)


@dataclass(frozen=True)
class Lion:
    """Chen et al. 2023, arXiv:2302.06675."""

    lr: float | None = option(None, above=0)
    betas: tuple[float, float] = option((0.9, 0.99), least=0, below=1)
    weight_decay: float = option(0.0, least=0)

    def build(self, rate: float) -> optim.Optimizer:
        """The optimizer at this learning rate."""
        return optim.Lion(rate, list(self.betas), self.weight_decay)


# What Muon does not suit (embeddings, layers at pixels, latent, text, time) or is too slow for (modulation).
EDGES = (
    *("conv_in", "conv_out", "embedding", "shared", "relative_attention_bias"),
    *("img_in", "txt_in", "in_layer", "final_layer", "img_mod", "txt_mod", "modulation"),
)


@dataclass(frozen=True)
class Muon:
    """Muon for matrices and convolutions (see `muon`), AdamW for vectors and for `adamw_layers`.

    adamw_share: of the learning rate, for AdamW. adamw_layers: parts of the names of parameters.
    """

    lr: float | None = option(None, above=0)
    adamw_share: float = option(0.1, above=0)
    adamw_layers: tuple[str, ...] = EDGES

    def build(self, rate: float) -> optim.Optimizer:
        """The optimizer at this learning rate."""
        return muon(rate, self.adamw_share * rate, self._is_other, self.adamw_share)

    def _is_other(self, name: str, parameter: mx.array) -> bool:
        return any(layer in name for layer in self.adamw_layers)


CONFIGURED = {"AdamW": AdamW, "Adam": Adam, "SGD": SGD, "RMSprop": RMSprop, "Lion": Lion, "Muon": Muon}
