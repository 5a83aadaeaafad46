"""Line charts, drawn with Pillow."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from flux.sheets import Font

WIDTH, HEIGHT = 720, 440
LEFT, TOP, RIGHT, BOTTOM = 94, 34, 150, 54  # margins; the legend stands at the right
COLOURS = ("#1f6fb4", "#d9532c", "#3a9d4f", "#8e5bb5", "#b8860b", "#16a0a0", "#c2417c", "#666666")
INK, GRID = "#222222", "#dddddd"


@dataclass(frozen=True)
class Curve:
    """A named line through points (x[i], y[i])."""

    name: str
    x: np.ndarray
    y: np.ndarray


def figure(
    title: str,
    curves: Sequence[Curve],
    marks: Sequence[float] = (),
    axes: tuple[str, str] = ("", ""),
) -> np.ndarray:
    """A chart (H, W, 3) uint8; vertical `marks` in x. Values that are not finite are left out.

    axes: what stands along x and along y.

    The y axis is logarithmic where all values are positive and spread over more than two decades.
    """
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    pen.text((LEFT, 10), title, INK, font)
    _name_axes(image, font, axes)
    curves = [curve for curve in map(_finite, curves) if len(curve.x)]
    if curves:
        xs, ys = np.concatenate([c.x for c in curves]), np.concatenate([c.y for c in curves])
        is_log = bool((ys > 0).all() and ys.max() > 100 * ys.min())
        across = _Axis(xs, LEFT, WIDTH - RIGHT, False)
        up = _Axis(ys, HEIGHT - BOTTOM, TOP, is_log)
        _frame(pen, font, across, up)
        for mark in [mark for mark in marks if xs.min() < mark < xs.max()]:
            pen.line([(across(mark), TOP), (across(mark), HEIGHT - BOTTOM)], "#999999")
        for i, curve in enumerate(curves):
            _line(pen, font, curve, across, up, i)
    return np.array(image)


def _name_axes(image: Image.Image, font: Font, axes: tuple[str, str]) -> None:
    across, up = axes
    middle = (LEFT + WIDTH - RIGHT) // 2
    ImageDraw.Draw(image).text((middle, HEIGHT - 22), across, INK, font, anchor="ma")
    length = HEIGHT - TOP - BOTTOM
    label = Image.new("RGB", (length, 20), "white")
    ImageDraw.Draw(label).text((length // 2, 2), up, INK, font, anchor="ma")
    image.paste(label.rotate(90, expand=True), (4, TOP))


class _Axis:
    """Values -> pixels, from `start` to `end`."""

    def __init__(self, values: np.ndarray, start: int, end: int, is_log: bool):
        self._is_log = is_log
        low, high = float(values.min()), float(values.max())
        if low == high:  # a flat line stands in the middle
            half = abs(low) / 2 or 0.5
            low, high = (low - half, high + half)
        self._low, self._high = self._scaled(low), self._scaled(high)
        self._start, self._end = start, end

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self._is_log else value

    def __call__(self, value: float) -> float:
        share = (self._scaled(value) - self._low) / (self._high - self._low)
        return self._start + share * (self._end - self._start)

    def ticks(self) -> list[float]:
        """About five round values."""
        if self._is_log:
            return [10.0**i for i in range(math.ceil(self._low), math.floor(self._high) + 1)]
        rough = (self._high - self._low) / 5
        power = 10 ** math.floor(math.log10(rough))
        step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
        first = math.ceil(self._low / step)
        return [i * step for i in range(first, math.floor(self._high / step) + 1)]


def _frame(pen: ImageDraw.ImageDraw, font: Font, across: _Axis, up: _Axis) -> None:
    for tick in up.ticks():
        y = up(tick)
        pen.line([(LEFT, y), (WIDTH - RIGHT, y)], GRID)
        pen.text((LEFT - 6, y), f"{tick:.4g}", INK, font, anchor="rm")
    for tick in across.ticks():
        pen.text((across(tick), HEIGHT - BOTTOM + 6), f"{tick:g}", INK, font, anchor="ma")
    pen.rectangle([LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM], outline=INK)


def _line(pen: ImageDraw.ImageDraw, font: Font, curve: Curve, across: _Axis, up: _Axis, i: int) -> None:
    colour = COLOURS[i % len(COLOURS)]
    points = [(across(x), up(y)) for x, y in zip(curve.x, curve.y, strict=True)]
    if len(points) > 1:
        pen.line(points, colour, 2)
    else:
        pen.ellipse([points[0][0] - 3, points[0][1] - 3, points[0][0] + 3, points[0][1] + 3], colour)
    y = TOP + 8 + 18 * i
    pen.line([(WIDTH - RIGHT + 8, y), (WIDTH - RIGHT + 26, y)], colour, 3)
    pen.text((WIDTH - RIGHT + 32, y), curve.name, INK, font, anchor="lm")


def _finite(curve: Curve) -> Curve:
    keep = np.isfinite(curve.y)
    return Curve(curve.name, curve.x[keep], curve.y[keep])
