"""Learning rates over the steps of a training: by name, as functions; and as tables of a config."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from flux.errors import FluxError
from flux.tables import option

Schedule = Callable[[mx.array], mx.array]  # step -> learning rate
SCHEDULES = ("constant", "linear", "cosine", "cosine_with_restarts")


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


def warmup_decay(peak: float, steps: int, warmup: int, hold: float = 0.0) -> Schedule:
    """Linear from 0 to `peak` in `warmup` steps, constant for the share `hold` of the rest, linear to 0."""
    start = warmup + hold * (steps - warmup)

    def rate(step: mx.array) -> mx.array:
        up = (step + 1) / warmup
        down = (steps - step) / (steps - start)
        return peak * mx.clip(mx.minimum(up, down), 0, 1)

    return rate


# --- Tables of a config: `factor(step, total)` of the learning rate, step 0 the first of `total` ---


@dataclass(frozen=True)
class Constant:
    """1 after a linear warm-up."""

    warmup_steps: int = option(0, least=0)

    def factor(self, step: int, total: int) -> float:
        """What the learning rate is multiplied by in this step of `total`, from 0."""
        return _warmup(step, self.warmup_steps)


@dataclass(frozen=True)
class Held:
    """`start_factor` for `steps` steps, then 1; in all steps where `steps` is not given."""

    start_factor: float = option(1.0, above=0)
    steps: int | None = option(None, least=1)

    def factor(self, step: int, total: int) -> float:
        """What the learning rate is multiplied by in this step of `total`, from 0."""
        return self.start_factor if step < (self.steps or total) else 1.0


@dataclass(frozen=True)
class Linear:
    """From `start_factor` to `end_factor` in `steps` steps, in all of them where `steps` is not given."""

    start_factor: float = option(1.0, least=0)
    end_factor: float = option(0.0, least=0)
    steps: int | None = option(None, least=1)

    def factor(self, step: int, total: int) -> float:
        """What the learning rate is multiplied by in this step of `total`, from 0."""
        share = min(1.0, step / (self.steps or max(1, total - 1)))
        return self.start_factor + share * (self.end_factor - self.start_factor)


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from 1 down to `min_factor` at the last step, after a linear warm-up."""

    warmup_steps: int = option(0, least=0)
    min_factor: float = option(0.0, least=0, most=1)

    def factor(self, step: int, total: int) -> float:
        """What the learning rate is multiplied by in this step of `total`, from 0."""
        if step < self.warmup_steps:
            return _warmup(step, self.warmup_steps)
        share = (step - self.warmup_steps) / max(1, total - 1 - self.warmup_steps)
        return self.min_factor + (1 - self.min_factor) * _half_cosine(min(1.0, share))


@dataclass(frozen=True)
class WarmupDecay:
    """1 after a linear warm-up, for the share `hold` of the rest; then linear, to 0 after the last step."""

    warmup_steps: int = option(0, least=0)
    hold: float = option(0.5, least=0, below=1)

    def factor(self, step: int, total: int) -> float:
        """What the learning rate is multiplied by in this step of `total`, from 0."""
        start = self.warmup_steps + self.hold * (total - self.warmup_steps)
        return min(_warmup(step, self.warmup_steps), max(0.0, (total - step) / max(1.0, total - start)))


@dataclass(frozen=True)
class Step:
    """Times `gamma` after every `step_size` steps: a tenth of all where it is not given."""

    step_size: int | None = option(None, least=1)
    gamma: float = option(0.1, above=0, most=1)

    def factor(self, step: int, total: int) -> float:
        """What the learning rate is multiplied by in this step of `total`, from 0."""
        return self.gamma ** (step // (self.step_size or max(1, total // 10)))


@dataclass(frozen=True)
class Exponential:
    """Times `gamma` after every step."""

    gamma: float = option(0.9999, above=0, most=1)

    def factor(self, step: int, total: int) -> float:
        """What the learning rate is multiplied by in this step of `total`, from 0."""
        return self.gamma**step


@dataclass(frozen=True)
class ReduceOnPlateau:
    """Times `gamma` when the epochs' means of `metric` have not fallen for more than `patience` epochs.

    threshold: what is less of a fall, as a share of the best mean, does not count as one.
    """

    metric: str = "loss"
    gamma: float = option(0.5, above=0, most=1)
    patience: int = option(10, least=0)
    min_factor: float = option(0.0, least=0, most=1)
    threshold: float = option(0.0, least=0, below=1)

    def factor(self, step: int, total: int) -> float:
        """What the learning rate is multiplied by in this step of `total`, from 0."""
        return 1.0  # what it does comes from the metric: see Plateau

    def after_epoch(self, plateau: "Plateau", value: float) -> "Plateau":
        """What is remembered after an epoch in which the metric's mean was `value`."""
        enough = self.threshold * abs(plateau.best) if math.isfinite(plateau.best) else 0.0
        if value < plateau.best - enough:
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
    "held": Held,
    "linear": Linear,
    "cosine": Cosine,
    "warmup_decay": WarmupDecay,
    "step": Step,
    "exponential": Exponential,
    "reduce_on_plateau": ReduceOnPlateau,
}


def _half_cosine(share: float) -> float:
    """From 1 to 0 while `share` goes from 0 to 1."""
    return 0.5 * (1 + math.cos(math.pi * share))


def _warmup(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / (steps + 1))


def kl_weight(step: int, beta: float, warmup_steps: int) -> float:
    """Half a cosine from 0 up to `beta`, reached after `warmup_steps` steps."""
    share = 1.0 if step >= warmup_steps else step / warmup_steps
    return beta * (1 - _half_cosine(share))
