"""What a training shows while it runs: a line with a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from flux.training.trainer import Callback, Means, Trainer

Item = TypeVar("Item")
QUIET_SECONDS = 15.0  # without a line, of long work where there is no terminal
BAR = "{desc} {percentage:3.0f}%|{bar:20}| {remaining}"


class Console:
    """Writes to standard error; nothing at all if quiet."""

    def __init__(self, quiet: bool):
        self._quiet = quiet
        self.is_live = sys.stderr.isatty() and not quiet
        self._bar: tqdm | None = None

    def say(self, text: str) -> None:
        """Writes a line, above the bar if there is one."""
        if not self._quiet:
            tqdm.write(text, file=sys.stderr)
            sys.stderr.flush()

    def begin(self, total: int, done: int) -> None:
        """Opens the bar; `done` of `total` have been done by earlier sessions."""
        self._bar = tqdm(total=total, initial=done, disable=not self.is_live, bar_format=BAR, leave=False)

    def advance(self) -> None:
        """Moves the bar by one."""
        if self._bar is not None:
            self._bar.update()

    def show(self, text: str) -> None:
        """Puts a text before the bar."""
        if self._bar is not None:
            self._bar.set_description_str(text, refresh=False)

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def track(self, items: Iterable[Item], title: str, total: int) -> Iterator[Item]:
        """The items, while a bar or a line now and then says how many are done."""
        start = last = time.monotonic()
        bar = tqdm(items, title, total, disable=not self.is_live)
        for done, item in enumerate(bar, 1):
            yield item
            now = time.monotonic()
            if not self.is_live and (now - last >= QUIET_SECONDS or (done == total and last > start)):
                self.say(f"{title}: {done} of {total}, {duration(now - start)}")
                last = now


class Advance(Callback):
    """Moves the console's bar with every batch."""

    def __init__(self, console: Console):
        self._console = console

    def between_batches(self, trainer: Trainer) -> None:
        self._console.advance()

    def after_step(self, trainer: Trainer, metrics: Means) -> None:
        self._console.advance()


def duration(seconds: float) -> str:
    """As `45 s`, `12 min` or `3 h 05 min`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
