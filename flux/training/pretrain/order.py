"""Which pictures each batch of an epoch has, and at which size: a function of the epoch and the number."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from flux.data import buckets
from flux.data.buckets import Size


class Order:
    """An epoch is a permutation of the pictures, in batches of one bucket each, in an order of their own.

    What does not fill a batch of its bucket is left out of the epoch. bucket_of: the bucket of each picture.
    """

    def __init__(self, bucket_of: np.ndarray, batch: int, seed: Sequence[int]):
        """bucket_of (N,), whole numbers from 0. batch: of all processes together."""
        self._bucket_of = bucket_of
        self._batch = batch
        self._seed = seed
        self.batches = int(sum(count // batch for count in np.bincount(bucket_of)))
        self._epoch = lru_cache(maxsize=2)(self._make)

    def rows(self, epoch: int, index: int) -> np.ndarray:
        """The pictures (batch,) of the epoch's batch number `index`."""
        return self._epoch(epoch)[index]

    def _make(self, epoch: int) -> np.ndarray:
        """(batches, batch): with one bucket the permutation as it is."""
        rng = np.random.default_rng((*self._seed, epoch))
        rows = rng.permutation(len(self._bucket_of))
        parts = [rows[self._bucket_of[rows] == bucket] for bucket in range(self._bucket_of.max() + 1)]
        whole = [part[: len(part) // self._batch * self._batch].reshape(-1, self._batch) for part in parts]
        made = np.concatenate(whole)
        return made if len(whole) == 1 else rng.permutation(made)


def bucket_of(sizes: Sequence[Size], among: Sequence[Size]) -> np.ndarray:
    """The bucket (N,) of pictures of these sizes, as `buckets.nearest` chooses."""
    chosen = {size: buckets.nearest(size, among) for size in set(sizes)}
    return np.array([chosen[size] for size in sizes], np.int64)


def crops(pictures: Sequence[np.ndarray], side: int, grid: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Squares (side, side, 3) of pictures (H, W, 3), at corners on a grid: as many pixels as the pictures.

    Of twice as many random ones of a picture those with the greatest deviation are taken: most of a picture
    may be flat.
    """
    return [square for picture in pictures for square in _crops(picture, side, grid, rng)]


def _crops(picture: np.ndarray, side: int, grid: int, rng: np.random.Generator) -> list[np.ndarray]:
    height, width = picture.shape[:2]
    count = max(1, height * width // side**2)
    tops, lefts = (grid * rng.integers((n - side) // grid + 1, size=2 * count) for n in (height, width))
    found = [picture[y : y + side, x : x + side] for y, x in zip(tops, lefts, strict=True)]
    return sorted(found, key=lambda square: -square.std())[:count]
