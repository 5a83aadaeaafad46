"""What a training leaves behind of its numbers: lines of JSON, and the plots that are drawn from them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from flux import images, outputs
from flux.errors import FluxError
from flux.training.plots import Curve, figure

Line = dict[str, Any]
SMOOTHED = 20  # so many parts has a smoothed curve's window of the run
METRICS = "training_metrics_{}.jsonl"  # of a step of pretraining
PLOTS = {
    "losses": ("loss", "vae", "mse", "lpips", "generator", "discriminator", "r1", "flow"),
    "kl": ("kl", "beta"),
}


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
                lines = [line for line in read_lines(path) if _number(line.get(position), np.inf) <= kept]
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
            line = json.loads(text)
        except ValueError:  # cut short, or not even UTF-8
            continue
        if isinstance(line, dict):
            found.append(line)
    return found


# --- Fine-tuning ---


def draw_loss(events: Path, picture: Path) -> None:
    """Draws loss, smoothed loss, validation loss and learning rate over the iterations of a fine-tuning."""
    lines = read_lines(events)
    updates = [line for line in lines if line.get("event") == "update"]
    loss, rate = _curve("loss", updates, "iteration", "loss"), _curve("rate", updates, "iteration", "rate")
    if not len(loss.y):
        return
    window = max(1, len(loss.y) // SMOOTHED)
    validations = [line for line in lines if line.get("event") == "validation"]
    curves = [loss, Curve("smoothed", loss.x, _smoothed(loss.y, window))]
    curves.append(_curve("validation", validations, "iteration", "loss"))
    charts = [figure("loss", [curve for curve in curves if len(curve.y)]), figure("learning rate", [rate])]
    images.save(picture, images.grid(charts, 2))


def _smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Each value's mean with those up to `window` - 1 before it."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


# --- Pretraining ---


def draw_steps(folder: Path, steps: Iterable[str]) -> None:
    """Draws the metrics of all steps: losses, kl, rates, times and overview (PNG), summary.txt."""
    lines = {step: read_lines(folder / METRICS.format(step)) for step in steps}
    lines = {step: found for step, found in lines.items() if found}
    every = [line for found in lines.values() for line in found]
    if not every:
        return
    marks = [_number(found[0].get("global_step"), 0) for found in lines.values()][1:]
    charts = {name: _metric_curves(every, names) for name, names in PLOTS.items()}
    rates = dict.fromkeys(name for line in every for name in _table(line, "learning_rates"))
    charts["rates"] = [_curve(name, every, "global_step", "learning_rates", name) for name in rates]
    charts["times"] = [_curve("seconds a batch", every, "global_step", "batch_time")]
    drawn = {name: figure(name, curves, marks) for name, curves in charts.items() if curves}
    for name, picture in drawn.items():
        images.save(folder / f"{name}.png", picture)
    rows = 2 if len(drawn) > 2 else 1
    images.save(folder / "overview.png", images.grid(list(drawn.values()), rows))
    write_whole(folder / "summary.txt", summary(lines))


def write_whole(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    with outputs.replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def summary(lines: dict[str, list[Line]]) -> str:
    """A text: for each step its length and every metric's first, last, least and greatest value."""
    parts = []
    for step, found in lines.items():
        seconds = float(np.mean(_curve("", found, "global_step", "batch_time").y))
        last = found[-1]
        position = f"epoch {last.get('epoch')}, global step {last.get('global_step')}"
        parts.append(f"{step}: to {position}, {seconds:.3f} s a batch\n")
        parts.append(f"  {'metric':<16}{'first':>12}{'last':>12}{'least':>12}{'greatest':>12}\n")
        names = sorted({name for line in found for name in _table(line, "metrics")})
        for curve in _metric_curves(found, names):
            y = curve.y
            row = "".join(f"{value:>12.5g}" for value in (y[0], y[-1], y.min(), y.max()))
            parts.append(f"  {curve.name:<16}{row}\n")
    return "".join(parts)


def _metric_curves(lines: list[Line], names: Iterable[str]) -> list[Curve]:
    curves = [_curve(name, lines, "global_step", "metrics", name) for name in names]
    return [curve for curve in curves if len(curve.y)]


def _curve(name: str, lines: list[Line], position: str, *keys: str) -> Curve:
    """What `keys`, one inside the other, lead to, over the lines' position; lines without it are left out."""
    x, y = [], []
    for line in lines:
        value: Any = line
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if _number(value) is not None and _number(line.get(position)) is not None:
            x.append(line[position])
            y.append(value)
    return Curve(name, np.array(x, float), np.array(y, float))


def _table(line: Line, key: str) -> dict[str, Any]:
    value = line.get(key)
    return value if isinstance(value, dict) else {}


def _number(value: Any, otherwise: float | None = None) -> Any:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else otherwise
