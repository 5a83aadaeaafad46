"""Does the built-in model draw what the prompt says? Pictures for held-out prompts, judged against renderings.

    python -m flux.training.pretrain.evaluate [--model tiny] [--count 400]

A picture's background is the colour nearest to the median of its outermost pixels. Its subject and place are
those of the rendering, among all subjects and places at the prompt's size on that background, with the least
squared distance in RGB over all pixels. Intervals are Wilson's, 95 %.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from flux.errors import FluxError
from flux.pipeline import FluxPipeline
from flux.training.pretrain.emoji import (
    COLOURS,
    PLACES,
    SIDE,
    Composition,
    Renderer,
    captions,
    compositions,
    subjects,
)

BATCH = 20
Generate = Callable[[list[str], list[int]], np.ndarray]  # prompts, seeds -> (B, 64, 64, 3) uint8


@dataclass(frozen=True)
class Share:
    """`right` of `total`, with Wilson's 95 % interval."""

    right: int
    total: int

    @property
    def interval(self) -> tuple[float, float]:
        z, n, p = 1.96, self.total, self.right / self.total
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        reach = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, middle - reach), min(1.0, middle + reach)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.right / self.total:.1%} ({self.right} of {self.total}; 95 % interval {low:.1%} to {high:.1%})"


class Judge:
    """Says what a picture shows. Renderings are made once for each size and background."""

    def __init__(self) -> None:
        self._render = Renderer()
        self._known: dict[tuple[str, str], np.ndarray] = {}

    def background(self, picture: np.ndarray) -> str:
        """The colour of the picture's (64, 64, 3) outermost pixels."""
        frame = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        distances = np.square(np.array(list(COLOURS.values())) - np.median(frame, axis=0)).sum(axis=1)
        return list(COLOURS)[int(distances.argmin())]

    def subject_and_place(self, picture: np.ndarray, size: str, colour: str) -> tuple[str, str]:
        """Of the nearest rendering at this size, on this background."""
        known = self._renderings(size, colour)  # (subjects * places, 64 * 64 * 3)
        flat = picture.astype(np.float32).reshape(-1)
        nearest = int((np.square(known).sum(axis=1) - 2 * known @ flat).argmin())
        return list(subjects())[nearest // len(PLACES)], PLACES[nearest % len(PLACES)]

    def _renderings(self, size: str, colour: str) -> np.ndarray:
        if (size, colour) not in self._known:
            self._known.clear()  # 50 MB each, and asked for one after the other
            pictures = [
                self._render(Composition((name,), colour, size, place))
                for name in subjects()
                for place in PLACES
            ]
            self._known[size, colour] = np.stack(pictures).reshape(len(pictures), -1).astype(np.float32)
        return self._known[size, colour]


def held_out_prompts(count: int, seed: int = 0) -> list[tuple[Composition, str]]:
    """The first `count` of a fixed order of the held-out compositions, each with one of its captions."""
    every = compositions(held_out=True)
    if not 1 <= count <= len(every):
        raise FluxError(f"--count {count}: there are {len(every)} held-out compositions")
    rng = np.random.default_rng(seed)
    chosen = [every[i] for i in rng.permutation(len(every))[:count]]
    return [(c, str(rng.choice(captions(c)))) for c in chosen]


def judge(pictures: np.ndarray, shown: Sequence[Composition]) -> dict[str, Share]:
    """How many pictures (B, 64, 64, 3) uint8 show what their compositions say."""
    judge, right = Judge(), {"subject": 0, "background": 0, "place": 0, "all three": 0}
    found = [judge.background(picture) for picture in pictures]
    for i in sorted(range(len(shown)), key=lambda i: (shown[i].size, found[i])):
        subject, place = judge.subject_and_place(pictures[i], shown[i].size, found[i])
        verdicts = (subject == shown[i].subjects[0], found[i] == shown[i].colour, place == shown[i].place)
        for name, verdict in zip(right, (*verdicts, all(verdicts)), strict=True):
            right[name] += verdict
    return {name: Share(count, len(shown)) for name, count in right.items()}


def judge_autoencoder(pipeline: FluxPipeline, shown: Sequence[Composition]) -> np.ndarray:
    """PSNR of each composition's picture after encoding and decoding, dB."""
    render = Renderer()
    values = []
    for start in range(0, len(shown), BATCH):
        pictures = np.stack([render(c) for c in shown[start : start + BATCH]])
        x = mx.array(pictures).astype(mx.float32) / 127.5 - 1
        decoded = np.array(to_uint8(pipeline.ae.decode(pipeline.ae.encode(x)) / 2 + 0.5))
        values.append(psnr(pictures, decoded))
    return np.concatenate(values)
