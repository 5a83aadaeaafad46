"""Optimizers and learning rates by their names in a config: each class has its keys and builds from them."""

import math
from dataclasses import dataclass

import mlx.optimizers as optim

from flux.tables import option

DEFAULT_RATE = 1e-4


@dataclass(frozen=True)
class AdamW:
    lr: float | None = option(None, above=0)
    betas: tuple[float, float] = option((0.9, 0.999), least=0, below=1)
    eps: float = option(1e-8, above=0)
    weight_decay: float = option(0.01, least=0)

    def build(self, rate: float) -> optim.Optimizer:
        return optim.AdamW(rate, list(self.betas), self.eps, self.weight_decay, bias_correction=True)


@dataclass(frozen=True)
class Adam:
    lr: float | None = option(None, above=0)
    betas: tuple[float, float] = option((0.9, 0.999), least=0, below=1)
    eps: float = option(1e-8, above=0)

    def build(self, rate: float) -> optim.Optimizer:
        return optim.Adam(rate, list(self.betas), self.eps, bias_correction=True)


@dataclass(frozen=True)
class SGD:
    lr: float | None = option(None, above=0)
    momentum: float = option(0.0, least=0, below=1)
    weight_decay: float = option(0.0, least=0)

    def build(self, rate: float) -> optim.Optimizer:
        return optim.SGD(rate, self.momentum, self.weight_decay)


@dataclass(frozen=True)
class RMSprop:
    lr: float | None = option(None, above=0)
    alpha: float = option(0.99, least=0, most=1)
    eps: float = option(1e-8, above=0)

    def build(self, rate: float) -> optim.Optimizer:
        return optim.RMSprop(rate, self.alpha, self.eps)


OPTIMIZERS = {"AdamW": AdamW, "Adam": Adam, "SGD": SGD, "RMSprop": RMSprop}


# --- Schedulers: `factor(step, total)` of the learning rate, step 0 the first of `total` ---


@dataclass(frozen=True)
class Constant:
    warmup_steps: int = option(0, least=0)

    def factor(self, step: int, total: int) -> float:
        return _warmup(step, self.warmup_steps)


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from 1 down to `min_factor` at the last step, after a linear warm-up."""

    warmup_steps: int = option(0, least=0)
    min_factor: float = option(0.0, least=0, most=1)

    def factor(self, step: int, total: int) -> float:
        if step < self.warmup_steps:
            return _warmup(step, self.warmup_steps)
        share = (step - self.warmup_steps) / max(1, total - 1 - self.warmup_steps)
        return self.min_factor + (1 - self.min_factor) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


@dataclass(frozen=True)
class Step:
    """Times `gamma` after every `step_size` steps."""

    step_size: int = option(least=1)
    gamma: float = option(0.1, above=0, most=1)

    def factor(self, step: int, total: int) -> float:
        return self.gamma ** (step // self.step_size)


@dataclass(frozen=True)
class Exponential:
    """Times `gamma` after every step."""

    gamma: float = option(0.9999, above=0, most=1)

    def factor(self, step: int, total: int) -> float:
        return self.gamma**step


@dataclass(frozen=True)
class ReduceOnPlateau:
    """Times `gamma` when the epochs' means of `metric` have not fallen for more than `patience` epochs."""

    metric: str = "loss"
    gamma: float = option(0.5, above=0, most=1)
    patience: int = option(10, least=0)
    min_factor: float = option(0.0, least=0, most=1)

    def factor(self, step: int, total: int) -> float:
        return 1.0  # what it does comes from the metric: see Plateau

    def after_epoch(self, plateau: "Plateau", value: float) -> "Plateau":
        """What is remembered after an epoch in which the metric's mean was `value`."""
        if value < plateau.best:
            return Plateau(value, 0, plateau.factor)
        if plateau.bad_epochs < self.patience:
            return Plateau(plateau.best, plateau.bad_epochs + 1, plateau.factor)
        return Plateau(plateau.best, 0, max(self.min_factor, self.gamma * plateau.factor))


@dataclass(frozen=True)
class Plateau:
    """What `ReduceOnPlateau` remembers between epochs."""

    best: float = math.inf
    bad_epochs: int = 0
    factor: float = 1.0


SCHEDULERS = {
    "constant": Constant,
    "cosine": Cosine,
    "step": Step,
    "exponential": Exponential,
    "reduce_on_plateau": ReduceOnPlateau,
}


def _warmup(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / (steps + 1))


def kl_weight(step: int, beta: float, warmup_steps: int) -> float:
    """Half a cosine from 0 up to `beta`, reached after `warmup_steps` steps."""
    share = 1.0 if step >= warmup_steps else step / warmup_steps
    return beta * 0.5 * (1 - math.cos(math.pi * share))
