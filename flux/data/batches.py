"""Which pictures are trained on when, under which captions: a pure function of (seed, epoch).

Nothing is drawn from a running generator, so a training may begin at any batch, and processes may share the
batches out: process r of n takes batches r, r + n, ... and sees what it would see alone.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain

import numpy as np

from flux.data import captions, pictures
from flux.data.buckets import Size
from flux.data.pictures import Placed
from flux.data.samples import Dataset
from flux.errors import FluxError

ORDER, FLIP, CAPTION, TEXT = range(4)  # what a generator is for


@dataclass(frozen=True)
class Entry:
    """One picture of a batch."""

    placed: Placed
    repeat: int  # the variant of its crop and colours; 0 where repeats do not differ
    flip: bool
    caption: str
    position: int  # counts all pictures of the training, over all epochs: the key for noise and times

    @property
    def is_reg(self) -> bool:
        """Whether it is a regularization picture."""
        return self.placed.sample.subset.is_reg


@dataclass(frozen=True)
class Batch:
    """Pictures of one size."""

    bucket: Size  # (height, width)
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Item:
    """One of the samples of an epoch, the same in every epoch."""

    placed: Placed
    repeat: int  # counts the sample's repeats


class Plan:
    """The batches of a training on a data set.

    Decodes every picture once, so that all that cannot be read is known before the long work. FluxError names
    it, with the errors of the data set.
    """

    def __init__(self, dataset: Dataset, seed: int, placed: list[Placed] | None = None):
        """placed: the data set's pictures, if they have been looked at."""
        if seed < 0:
            raise FluxError(f"the seed {seed} should be 0 or more")
        self.seed = seed
        self.groups = dataset.groups
        placed = pictures.fit(dataset) if placed is None else placed
        self.placed, self.held_out = placed[: len(dataset.samples)], placed[len(dataset.samples) :]
        self.items = epoch_items(self.placed, len(dataset.groups))
        counts = self.bucket_table()
        self.batches_per_epoch = sum(-(-n // self.groups[g].batch_size) for (g, _), n in counts.items())
        self.epoch = lru_cache(maxsize=2)(self._epoch)  # number of the epoch, from 0 -> its batches

    @property
    def masked(self) -> bool:
        """Whether any picture's loss is masked."""
        return any(placed.sample.subset.alpha_mask or placed.mask for placed in self.placed + self.held_out)

    def digest(self) -> str:
        """What the training's data are: contents, texts and options, not names or folders."""
        parts = []
        for placed in self.placed + self.held_out:
            options = replace(placed.sample.subset, mask_dir=None)
            parts.append(
                (placed.digest, placed.mask, placed.bucket, placed.sample.texts, options, self.groups)
            )
        return hashlib.sha256(repr((len(self.placed), parts)).encode()).hexdigest()

    def bucket_table(self) -> dict[tuple[int, Size], int]:
        """(group, bucket) -> samples an epoch."""
        counts: dict[tuple[int, Size], int] = defaultdict(int)
        for item in self.items:
            counts[item.placed.sample.group, item.placed.bucket] += 1
        return dict(sorted(counts.items()))

    def batch(self, number: int) -> Batch:
        """The number-th batch of the training, from 0, over all epochs."""
        epoch, index = divmod(number, self.batches_per_epoch)
        return self.epoch(epoch)[index]

    def _epoch(self, epoch: int) -> tuple[Batch, ...]:
        """The batches of an epoch (from 0). Each has pictures of one bucket; a bucket's last may be short."""
        rng = self._rng(ORDER, epoch)
        by_bucket: dict[tuple[int, Size], list[int]] = defaultdict(list)
        for i in rng.permutation(len(self.items)):
            placed = self.items[i].placed
            by_bucket[placed.sample.group, placed.bucket].append(int(i))
        chunks = [
            numbers[start : start + self.groups[group].batch_size]
            for (group, _), numbers in sorted(by_bucket.items())
            for start in range(0, len(numbers), self.groups[group].batch_size)
        ]
        batches, position = [], epoch * len(self.items)
        for k in rng.permutation(len(chunks)):
            entries = tuple(self._entry(i, epoch, position + j) for j, i in enumerate(chunks[k]))
            batches.append(Batch(entries[0].placed.bucket, entries))
            position += len(entries)
        return tuple(batches)

    def _entry(self, number: int, epoch: int, position: int) -> Entry:
        item = self.items[number]
        sample = item.placed.sample
        return Entry(
            placed=item.placed,
            repeat=item.repeat if pictures.varies(sample) else 0,
            flip=sample.subset.flip_aug and bool(self._rng(FLIP, epoch, number).integers(2)),
            caption=self._caption(number, epoch),
            position=position,
        )

    def _caption(self, number: int, epoch: int) -> str:
        sample = self.items[number].placed.sample
        text = sample.text
        if len(sample.texts) > 1:
            text = sample.texts[int(self._rng(TEXT, epoch, number).integers(len(sample.texts)))]
        return captions.compose(text, sample.subset, epoch, self._rng(CAPTION, epoch, number))

    def captions(self, epochs: int) -> list[str]:
        """All captions of the first epochs and of the validation, each once: what must be encoded."""
        trained = (self._caption(i, epoch) for epoch in range(epochs) for i in range(len(self.items)))
        validated = (entry.caption for batch in self.validation() for entry in batch.entries)
        return list(dict.fromkeys(chain(trained, validated)))

    def variants(self) -> list[tuple[Placed, int]]:
        """All (picture, repeat) of the training and the validation, each once: what must be encoded."""
        trained = ((i.placed, i.repeat if pictures.varies(i.placed.sample) else 0) for i in self.items)
        return list(dict.fromkeys([*trained, *((placed, 0) for placed in self.held_out)]))

    def validation(self) -> list[Batch]:
        """The pictures held out, without chance: no flip, no dropout, tags in their order."""
        by_bucket: dict[tuple[int, Size], list[Entry]] = defaultdict(list)
        for i, placed in enumerate(self.held_out):
            options = replace(
                placed.sample.subset,
                shuffle_caption=False,
                caption_dropout_rate=0.0,
                caption_tag_dropout_rate=0.0,
                caption_dropout_every_n_epochs=0,
            )
            caption = captions.compose(placed.sample.text, options, 0, self._rng(CAPTION, 0, i))
            key = placed.sample.group, placed.bucket
            by_bucket[key].append(Entry(placed, 0, False, caption, i))
        return [
            Batch(bucket, tuple(entries[start : start + self.groups[group].batch_size]))
            for (group, bucket), entries in sorted(by_bucket.items(), key=lambda pair: pair[0])
            for start in range(0, len(entries), self.groups[group].batch_size)
        ]

    def _rng(self, use: int, *numbers: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, use, *numbers])


def epoch_items(placed: Sequence[Placed], groups: int) -> list[Item]:
    """What every epoch consists of: each sample as often as it repeats, group by group.

    Regularisation pictures go round until they are as many as the others of their group; of more than that
    only the first are taken.
    """
    items = []
    for group in range(groups):
        of_group = [each for each in placed if each.sample.group == group]
        trained = _repeated(each for each in of_group if not each.sample.subset.is_reg)
        items += trained
        regular = _repeated(each for each in of_group if each.sample.subset.is_reg)
        for i in range(len(trained) if regular else 0):
            lap, index = divmod(i, len(regular))
            item = regular[index]
            items.append(Item(item.placed, item.repeat + lap * item.placed.sample.subset.num_repeats))
    return items


def _repeated(placed: Iterable[Placed]) -> list[Item]:
    return [Item(each, repeat) for each in placed for repeat in range(each.sample.subset.num_repeats)]
