"""What a training leaves behind of its numbers: lines of JSON, and the plot that is drawn from them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flux import images
from flux.errors import FluxError
from flux.training.plots import Curve, figure

Line = dict[str, Any]
SMOOTHED = 20  # so many parts has a smoothed curve's window of the run


class Events:
    """A file of JSON lines, each complete on disk before `write` returns.

    Lines of an earlier session that `is_kept` says no to are dropped: the run makes them again. So is a last
    one that a kill has cut short.
    """

    def __init__(self, path: Path, is_kept: Callable[[Line], bool]):
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file():
                kept = [line for line in read_lines(path) if is_kept(line)]
                partial = path.with_suffix(".partial")
                partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
                partial.replace(path)
        except OSError as error:
            raise FluxError(f"{path}: cannot be written: {error.strerror}") from None

    def write(self, line: Line) -> None:
        """Appends a line. FluxError where the disk refuses."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise FluxError(f"{self.path}: cannot be written: {error.strerror}") from None


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of a file of `Events`; a last one that a kill has cut short is left out."""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return


def draw_loss(events: Path, picture: Path) -> None:
    """Draws loss, smoothed loss, validation loss and learning rate over the iterations of a fine-tuning."""
    lines = list(read_lines(events)) if events.is_file() else []
    updates = [line for line in lines if line["event"] == "update"]
    if not updates:
        return
    loss = _curve("loss", updates, "loss")
    window = max(1, len(loss.y) // SMOOTHED)
    curves = [loss, Curve("smoothed", loss.x, _smoothed(loss.y, window))]
    if validations := [line for line in lines if line["event"] == "validation"]:
        curves.append(_curve("validation", validations, "loss"))
    charts = [figure("loss", curves), figure("learning rate", [_curve("rate", updates, "rate")])]
    images.save(picture, images.grid(charts, 2))


def _curve(name: str, lines: list[Line], key: str) -> Curve:
    points = [(line["iteration"], line[key]) for line in lines]
    x, y = zip(*points, strict=True)
    return Curve(name, np.array(x, float), np.array(y, float))


def _smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Each value's mean with those up to `window` - 1 before it."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)
