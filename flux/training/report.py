"""What a training leaves behind of its numbers: lines of JSON, and the plots that are drawn from them."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from flux import images, jsonfiles, outputs
from flux.errors import FluxError
from flux.training.plots import Curve, figure

Line = dict[str, Any]
SMOOTHED = 20  # so many parts has a smoothed curve's window of the run


class Events:
    """A file of JSON lines, each complete on disk before `write` returns.

    Lines of an earlier session that have come farther than `kept` are dropped: the run makes them again. So
    are damaged ones, such as a last one that a kill has cut short.
    """

    def __init__(self, path: Path, position: str, kept: int):
        """position: the key that says how far a line has come; lines up to `kept` stay."""
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file():
                lines = [line for line in read_lines(path) if number(line.get(position), np.inf) <= kept]
                write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))
        except OSError as error:
            raise FluxError(f"{path}: cannot be written: {error.strerror}") from None

    def write(self, line: Line) -> None:
        """Appends a line. FluxError where the disk refuses."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise FluxError(f"{self.path}: cannot be written: {error.strerror}") from None


def read_lines(path: Path) -> list[Line]:
    """The lines of a file of `Events` that are whole; none where there is no file."""
    if not path.is_file():
        return []
    found = []
    for text in path.read_bytes().split(b"\n"):
        try:
            line = jsonfiles.parse(text, infinite=True)
        except ValueError:  # cut short, or not even UTF-8
            continue
        if isinstance(line, dict):
            found.append(line)
    return found


def write_whole(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all. FluxError where the disk refuses."""
    try:
        with outputs.replacing(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise FluxError(f"{path}: cannot be written: {error.strerror}") from None


def curve(name: str, lines: list[Line], position: str, *keys: str) -> Curve:
    """What `keys`, one inside the other, lead to, over the lines' position; lines without it are left out."""
    x, y = [], []
    for line in lines:
        value: Any = line
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if number(value) is not None and number(line.get(position)) is not None:
            x.append(line[position])
            y.append(value)
    return Curve(name, np.array(x, float), np.array(y, float))


def table_of(line: Line, key: str) -> dict[str, Any]:
    """The table under a key; an empty one where there is none."""
    value = line.get(key)
    return value if isinstance(value, dict) else {}


def number(value: Any, otherwise: float | None = None) -> Any:
    """The value, or `otherwise` where it is no number."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else otherwise


# --- Fine-tuning ---


def draw_loss(events: Path, picture: Path) -> None:
    """Draws loss, smoothed loss, validation loss and learning rate over the iterations of a fine-tuning."""
    lines = read_lines(events)
    updates = [line for line in lines if line.get("event") == "update"]
    loss, rate = curve("loss", updates, "iteration", "loss"), curve("rate", updates, "iteration", "rate")
    if not len(loss.y):
        return
    window = max(1, len(loss.y) // SMOOTHED)
    validations = [line for line in lines if line.get("event") == "validation"]
    curves = [loss, Curve("smoothed", loss.x, _smoothed(loss.y, window))]
    curves.append(curve("validation", validations, "iteration", "loss"))
    charts = [
        figure("loss", [each for each in curves if len(each.y)], axes=("iteration", "loss")),
        figure("learning rate", [rate], axes=("iteration", "learning rate")),
    ]
    images.save(picture, images.grid(charts, 2))


def _smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Each value's mean with those up to `window` - 1 before it."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)
