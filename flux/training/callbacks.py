"""What happens beside the steps: lines of numbers, states on disk."""

import json
import time
from pathlib import Path

from flux.training.trainer import Metrics, Trainer


class Log:
    """One JSON line every `interval` steps: the step, each metric's mean since the last, steps a second."""

    def __init__(self, file: Path, interval: int):
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file = file
        self._interval = interval
        self._sums: dict[str, float] = {}
        self._count = 0
        self._start = time.monotonic()

    def __call__(self, trainer: Trainer, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.item()
        self._count += 1
        if self._count < self._interval:
            return
        now = time.monotonic()
        means = {name: round(total / self._count, 6) for name, total in self._sums.items()}
        line = {
            "step": trainer.step,
            **means,
            "steps_per_second": round(self._count / (now - self._start), 3),
        }
        text = json.dumps(line)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
        print(time.strftime("[%H:%M:%S]"), text, flush=True)
        self._sums, self._count, self._start = {}, 0, now


class Save:
    """The whole state to `file`, every `minutes` minutes."""

    def __init__(self, file: Path, minutes: float = 3.0):
        self._file = file
        self._seconds = 60 * minutes
        self._last = time.monotonic()

    def __call__(self, trainer: Trainer, metrics: Metrics) -> None:
        if time.monotonic() - self._last >= self._seconds:
            trainer.save(self._file)
            self._last = time.monotonic()
