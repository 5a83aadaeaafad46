"""What a fine-tuning shows while it runs: a bar on a terminal, a line now and then elsewhere."""

import sys
from typing import Any

import mlx.core as mx
from tqdm import tqdm

LINES = 20  # of a whole run, where there is no terminal


class Console:
    """Writes to standard error; nothing at all if quiet."""

    def __init__(self, quiet: bool):
        self._quiet = quiet
        self._live = sys.stderr.isatty() and not quiet
        self._bar = None

    def say(self, text: str) -> None:
        """A line of its own."""
        if not self._quiet:
            tqdm.write(text, file=sys.stderr)

    def begin(self, iterations: int, done: int) -> None:
        """Opens the bar; `done` of the iterations have been made by earlier sessions."""
        self._iterations = iterations
        self._bar = tqdm(total=iterations, initial=done, unit="it", disable=not self._live)

    def batch(self) -> None:
        """After every batch."""
        self._bar.update()

    def update(self, line: dict[str, Any], every: int) -> None:
        """After every update, with its line of events.jsonl; `every` of them there is a line of text."""
        peak = f"{mx.get_peak_memory() / 1e9:.2f} GB"
        rate = f"{line['rate'] * line.get('d', 1.0):.3g}"
        self._bar.set_postfix_str(f"loss {line['loss']:.4f}, rate {rate}, peak {peak}", refresh=False)
        if not self._live and line["update"] % every == 0:
            speed = f"{1 / max(1e-9, line['seconds']):.2f} updates/s"
            place = f"iteration {line['iteration']}/{self._iterations}"
            self.say(f"{place} | loss {line['loss']:.4f} | rate {rate} | {speed} | peak {peak}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
