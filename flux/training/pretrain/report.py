"""What a run leaves behind of its numbers: metrics as JSON lines, plots and a summary drawn from them."""

import time
from pathlib import Path
from typing import Any

import numpy as np

from flux import images
from flux.training.plots import Curve, figure
from flux.training.report import Events, read_lines

PLOTS = {
    "losses": ("loss", "vae", "mse", "lpips", "generator", "discriminator", "r1", "flow"),
    "kl": ("kl", "beta"),
}


class MetricsFile:
    """`graph/training_metrics_{step}.jsonl`: a line every few optimizer steps, with the means since the last.

    What an earlier session wrote after the checkpoint that this one goes on from is dropped: the run makes it
    again.
    """

    def __init__(self, folder: Path, step: str, global_step: int):
        path = folder / f"training_metrics_{step}.jsonl"
        self._events = Events(path, lambda line: line["global_step"] <= global_step)

    def write(
        self,
        place: dict[str, int],
        metrics: dict[str, float],
        rates: dict[str, float],
        batch_time: float,
    ) -> None:
        """place: session, epoch, batch, global_step. rates: by group. batch_time: seconds."""
        line = {
            "timestamp": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            **place,
            "metrics": metrics,
            "learning_rates": rates,
            "batch_time": round(batch_time, 4),
        }
        self._events.write(line)


def draw(folder: Path, steps: list[str]) -> None:
    """Writes losses.png, kl.png, rates.png, times.png, overview.png and summary.txt into `folder`."""
    lines = {}
    for step in steps:
        path = folder / f"training_metrics_{step}.jsonl"
        if path.is_file():
            lines[step] = list(read_lines(path))
    every = [line for found in lines.values() for line in found]
    if not every:
        return
    marks = [found[0]["global_step"] for found in lines.values() if found][1:]
    charts = {name: _metric_curves(every, names) for name, names in PLOTS.items()}
    charts["rates"] = _curves(every, "learning_rates")
    charts["times"] = [Curve("seconds a batch", *_points(every, lambda line: line["batch_time"]))]
    drawn = {name: figure(name, curves, marks) for name, curves in charts.items() if curves}
    for name, picture in drawn.items():
        images.save(folder / f"{name}.png", picture)
    rows = 2 if len(drawn) > 2 else 1
    images.save(folder / "overview.png", images.grid(list(drawn.values()), rows))
    (folder / "summary.txt").write_text(summary(lines), encoding="utf-8")


def _metric_curves(lines: list[dict], names: tuple[str, ...]) -> list[Curve]:
    found = {name for line in lines for name in line["metrics"]}
    return [
        Curve(name, *_points(lines, lambda line, name=name: line["metrics"].get(name)))
        for name in names
        if name in found
    ]


def _curves(lines: list[dict], key: str) -> list[Curve]:
    names = dict.fromkeys(name for line in lines for name in line[key])
    return [Curve(name, *_points(lines, lambda line, name=name: line[key].get(name))) for name in names]


def _points(lines: list[dict], value: Any) -> tuple[np.ndarray, np.ndarray]:
    points = [(line["global_step"], value(line)) for line in lines if value(line) is not None]
    x, y = zip(*points, strict=True)
    return np.array(x, float), np.array(y, float)


def summary(lines: dict[str, list[dict]]) -> str:
    """A text: for each step its length and every metric's first, last, least and greatest value."""
    parts = []
    for step, found in lines.items():
        if not found:
            continue
        seconds = float(np.mean([line["batch_time"] for line in found]))
        last = found[-1]
        place = f"epoch {last['epoch']}, global step {last['global_step']}"
        parts.append(f"{step}: to {place}, {seconds:.3f} s a batch\n")
        parts.append(f"  {'metric':<16}{'first':>12}{'last':>12}{'least':>12}{'greatest':>12}\n")
        for curve in _metric_curves(found, tuple(sorted({n for line in found for n in line["metrics"]}))):
            y = curve.y
            row = "".join(f"{value:>12.5g}" for value in (y[0], y[-1], y.min(), y.max()))
            parts.append(f"  {curve.name:<16}{row}\n")
    return "".join(parts)
