"""What happens beside a training's steps: numbers logged, states saved, pictures drawn, an orderly stop."""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flux.distributed.ranks import Ranks, RanksError
from flux.training.console import Console, duration
from flux.training.trainer import Callback, Means, Trainer

Due = Callable[[Trainer], bool]
ESTIMATED_AFTER = 3  # steps of a session: the first one compiles
WORTH_ESTIMATING = 10  # steps that are left


class Stopped(Exception):
    """The training was asked to stop, and its state is on disk."""


@dataclass
class Window:
    """Sums and counts of metrics: their means over several steps, as JSON across a resume, too."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, metrics: Means) -> None:
        """Takes in a step's metrics, which need not be the same in every step."""
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def take(self) -> Means:
        """The means; the window is empty afterwards."""
        means = {name: total / self.counts[name] for name, total in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means


class Log(Callback):
    """Calls write(trainer, means, seconds) every `interval` steps and after the last.

    means: of each metric since the last call. seconds: of a step, without what other callbacks take. The
    latest of both stay as attributes. Should stand before the callbacks that take time.
    """

    def __init__(
        self, write: Callable[[Trainer, Means, float], None], interval: int = 1, window: Window | None = None
    ):
        """window: with what an earlier session has not yet logged."""
        self._write = write
        self._interval = interval
        self._window = window or Window()
        self._start = 0.0
        self._seconds: list[float] = []
        self.means: Means = {}
        self.seconds = 0.0

    def before_step(self, trainer: Trainer) -> None:
        self._start = time.monotonic()

    def after_step(self, trainer: Trainer, metrics: Means) -> None:
        self._seconds.append(time.monotonic() - self._start)
        self._window.add(metrics)
        if trainer.step % self._interval == 0 or trainer.is_done:
            self.seconds = sum(self._seconds) / len(self._seconds)
            self.means, self._seconds = self._window.take(), []
            self._write(trainer, self.means, self.seconds)


def json_lines(path: Path) -> Callable[[Trainer, Means, float], None]:
    """For `Log`: appends a JSON line to the file, and prints it with the time of day."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(trainer: Trainer, means: Means, seconds: float) -> None:
        line: dict[str, Any] = {"step": trainer.step, **{name: round(v, 6) for name, v in means.items()}}
        text = json.dumps(line | {"steps_per_second": round(1 / max(seconds, 1e-9), 3)})
        with path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
        print(time.strftime("[%H:%M:%S]"), text, flush=True)

    return write


def always(trainer: Trainer) -> bool:
    """Due after every step."""
    return True


class Every(Callback):
    """Calls action(trainer) after each step for which due(trainer) is true: to save, to validate, to draw."""

    def __init__(self, due: Due, action: Callable[[Trainer], None]):
        self._due = due
        self._action = action

    def after_step(self, trainer: Trainer, metrics: Means) -> None:
        if self._due(trainer):
            self._action(trainer)


def interval(steps: float = math.inf, seconds: float = math.inf) -> Due:
    """Due after so many steps (of the whole training), or so many seconds since it was due."""
    last = time.monotonic()

    def due(trainer: Trainer) -> bool:
        nonlocal last
        is_due = trainer.step % steps == 0 or time.monotonic() - last >= seconds
        last = time.monotonic() if is_due else last
        return is_due

    return due


def logged_and_saved(log: Path, state: Path, steps: int, seconds: float = 180.0) -> tuple[Callback, ...]:
    """For a training of one file of state: `json_lines` every so many steps, the state now and then."""
    save = Every(interval(seconds=seconds), lambda trainer: trainer.save(state))
    return Log(json_lines(log), steps), save


class Finite(Callback):
    """Ends the training where a metric is not a finite number: its parameters are of no use any more."""

    def __init__(self, advice: Callable[[Trainer], str]):
        """advice: what the error says after the metrics: which step, what to do."""
        self._advice = advice

    def after_step(self, trainer: Trainer, metrics: Means) -> None:
        wrong = [f"the {name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
        if wrong:  # on every rank: the metrics are the same
            raise RanksError(f"{', '.join(wrong)} {self._advice(trainer)}")


class Estimate(Callback):
    """Says once, after the first steps, how long the rest of them will take."""

    def __init__(self, say: Callable[[str], None], steps: int, unit: str):
        """steps: at which the training ends. unit: what a step is called."""
        self._say = say
        self._steps = steps
        self._unit = unit
        self._count = 0
        self._start = 0.0

    def after_step(self, trainer: Trainer, metrics: Means) -> None:
        self._count += 1
        left = self._steps - trainer.step
        if self._count == 1:
            self._start = time.monotonic()
        elif self._count == ESTIMATED_AFTER and left >= WORTH_ESTIMATING:
            each = (time.monotonic() - self._start) / (ESTIMATED_AFTER - 1)
            self._say(f"about {duration(left * each)} for the {left} {self._unit} that are left")


class Stop(Callback):
    """Ends a training with `Stopped` when any of its ranks is asked to, for example by a signal.

    One process stops after the batch at hand, several after the step at hand, all of them. What has come to
    its last step is not stopped any more.
    """

    def __init__(self, ranks: Ranks, quiet: bool = False):
        self._ranks = ranks
        self._console = Console(quiet or not ranks.is_rank_zero)
        self._is_training = False
        self._is_asked = False

    def ask(self) -> None:
        """Asks for it. KeyboardInterrupt where nothing is training, and when it is asked again."""
        if not self._is_training or self._is_asked:
            raise KeyboardInterrupt
        self._is_asked = True
        self._console.say("stopping: saving the state")

    @contextmanager
    def training(self) -> Iterator[None]:
        """Around a training that can stop: before and after it there is nothing to save."""
        self._is_training = True
        try:
            yield
        finally:
            self._is_training = False

    def between_batches(self, trainer: Trainer) -> None:
        if self._is_asked and self._ranks.size == 1:
            raise Stopped

    def after_step(self, trainer: Trainer, metrics: Means) -> None:
        if any(self._ranks.gather(self._is_asked)) and not trainer.is_done:
            raise Stopped
