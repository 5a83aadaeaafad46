"""Batches of a step: a function of the step's number, so that a resumed run sees what it would have seen."""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from flux import images
from flux.data.buckets import Size
from flux.data.sources import Pictures, sizes
from flux.errors import FluxError
from flux.training.pretrain.config import Config, Step
from flux.training.pretrain.encoded import Encoded
from flux.training.pretrain.networks import Tokenizers
from flux.training.pretrain.order import Order, bucket_of, crops
from flux.training.schedules import kl_weight


@dataclass(frozen=True)
class Shard:
    """This process's shard of the data: the `rank`-th part of each epoch's `size`."""

    rank: int = 0
    size: int = 1


class Batches:
    """number -> a batch for `Objective`. An epoch is a permutation of the data without its incomplete end.

    encoded: where the latents are kept, if the step needs no more of the pictures.
    """

    def __init__(
        self,
        config: Config,
        index: int,
        source: Pictures,
        tokenizers: Tokenizers | None,
        shard: Shard,
        encoded: Encoded | None = None,
    ):
        self._step: Step = config.steps[index]
        self._source = source
        self._tokenizers = tokenizers if self._step.train_diff else None
        self._shard = shard
        self._encoded = encoded
        self._seed = (config.training.seed, index)
        self._sizes = config.data.trained_sizes
        self._bucket_of = np.zeros(len(source), np.int64)  # of each picture
        if config.data.buckets:
            self._bucket_of = bucket_of(sizes(source), self._sizes)
        self._has_buckets = bool(config.data.buckets)
        self._grid = 2 ** (len(config.model.autoencoder.ch_mult) - 1)  # pixels of a latent
        self._prompt = config.data.prompt
        workers = self._step.workers
        self._pool = ThreadPoolExecutor(workers) if workers else None
        self._ahead: tuple[int, list[Future]] | None = None
        self._order = Order(self._bucket_of, self._step.batch_size * shard.size, self._seed)
        self._tokens = lru_cache(maxsize=100_000)(_tokenize)
        self.epoch_length = self._updates_per_epoch()
        self._per_epoch = self.epoch_length * self._step.gradient_accumulation_steps

    def _updates_per_epoch(self) -> int:
        step, processes = self._step, self._shard.size
        each = step.batch_size * step.gradient_accumulation_steps
        found = self._order.batches // step.gradient_accumulation_steps
        if found == 0:
            size = " of one size" if self._has_buckets else ""
            raise FluxError(
                f'step "{step.name}": {len(self._source)} pictures cannot fill a batch{size} of '
                f"{each} for each of {processes} process(es)"
            )
        return min(found, step.max_steps or found) if step.epochs else found

    def __call__(self, number: int) -> dict[str, Any]:
        batch = self._images(number, self._rows(number), self._size(number))
        if self._step.decodes:
            update = number // self._step.gradient_accumulation_steps
            beta = kl_weight(update, self._step.kl_beta, self._step.kl_warmup_steps)
            batch["beta"] = mx.array(beta)
            # A Python value: the trainer compiles a step with and one without the penalty.
            batch["r1"] = self._step.gan_training and update % self._step.r1_interval == 0
        if self._tokenizers is not None:
            tokens = [self._tokens(self._tokenizers, text) for text in self.texts(number)]
            clip, t5 = zip(*tokens, strict=True)
            batch["clip"] = mx.array(without_padding(np.array(clip), self._tokenizers.clip.eos_token_id))
            batch["t5"] = mx.array(np.array(t5))
        return batch

    def texts(self, number: int) -> list[str]:
        """The captions of a batch, some of them empty for classifier-free guidance."""
        dropped = self._random(number, 1).random(self._step.batch_size) < self._step.cfg_dropout_prob
        texts = [self._prompt(self._caption(number, row)) for row in self._rows(number)]
        return ["" if drop else text for text, drop in zip(texts, dropped, strict=True)]

    def _caption(self, number: int, row: int) -> str:
        """A picture's caption; of several one is drawn each epoch."""
        texts = self._source.texts(int(row))
        if len(texts) < 2:
            return texts[0] if texts else ""
        rng = np.random.default_rng((*self._seed, number // self._per_epoch, 3, int(row)))
        return texts[int(rng.integers(len(texts)))]

    def _rows(self, number: int) -> np.ndarray:
        epoch, index = divmod(number, self._per_epoch)
        first = self._shard.rank * self._step.batch_size
        return self._order.rows(epoch, index)[first : first + self._step.batch_size]

    def _size(self, number: int) -> Size:
        """The pictures' size; the same in all processes, whose batches cost the same time then."""
        if self._has_buckets:
            return self._sizes[self._bucket_of[self._rows(number)[0]]]
        return self._sizes[int(np.random.default_rng((*self._seed, number, 2)).choice(len(self._sizes)))]

    def _random(self, number: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng((*self._seed, number, purpose, self._shard.rank))

    def _images(self, number: int, rows: np.ndarray, size: Size) -> dict[str, Any]:
        """The batch's pictures or crops of them, or their latents' mean and log variance."""
        found = self._pictures(number, rows, size)
        if self._encoded is None:
            if self._crops(number):
                found = crops(found, self._step.crop_size or 0, self._grid, self._random(number, 4))
            return {"pictures": mx.array(np.stack(found))}
        return dict(zip(("mean", "logvar"), self._latents(self._encoded, rows, found), strict=True))

    def _crops(self, number: int) -> bool:
        """Whether a batch is of crops; the same in all processes."""
        share = self._step.crop_share if self._step.crop_size else 0.0
        return bool(np.random.default_rng((*self._seed, number, 5)).random() < share)

    def _latents(self, encoded: Encoded, rows: Iterable[int], found: list[np.ndarray]) -> mx.array:
        """(2, B, h, w, z), float32, of records and of pictures, which are encoded."""
        records = [
            encoded.make(int(row), each) if each.dtype == np.uint8 else each
            for row, each in zip(rows, found, strict=True)
        ]
        return mx.array(np.stack(records, axis=1))

    def _pictures(self, number: int, rows: np.ndarray, size: Size) -> list[np.ndarray]:
        """The batch's pictures or records; the next batch's are begun at the same time."""
        if self._pool is None:
            return [self._load(row, size) for row in rows]
        ahead, self._ahead = self._ahead, None
        futures = ahead[1] if ahead is not None and ahead[0] == number else self._begin(self._pool, number)
        self._ahead = (number + 1, self._begin(self._pool, number + 1))
        return [future.result() for future in futures]

    def _begin(self, pool: ThreadPoolExecutor, number: int) -> list[Future]:
        size = self._size(number)
        return [pool.submit(self._load, row, size) for row in self._rows(number)]

    def _load(self, row: int, size: Size) -> np.ndarray:
        """A picture (H, W, 3), uint8; its record (2, h, w, z), float32, if it has been encoded."""
        record = None if self._encoded is None else self._encoded.read(int(row), size)
        if record is not None:
            return record
        return images.fit(self._source.picture(int(row)), size)

    def first(self, count: int, size: Size | None = None) -> list[np.ndarray]:
        """The data's first pictures, fitted to (height, width) or to what each is trained at."""
        rows = range(min(count, len(self._source)))
        return [
            images.fit(self._source.picture(row), size or self._sizes[self._bucket_of[row]]) for row in rows
        ]

    def captions(self, count: int) -> list[str]:
        """The captions of the data's first pictures."""
        rows = range(min(count, len(self._source)))
        return [self._prompt(caption) for row in rows for caption in self._source.texts(row)[:1]]

    def close(self) -> None:
        """Ends the threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def without_padding(ids: np.ndarray, end: int) -> np.ndarray:
    """CLIP's token ids (B, L) without what stands after the last row's end, in a multiple of 8 columns.

    CLIP is causal and its vector is read at the first end token: what follows it changes nothing.
    """
    length = 1 + int((ids == end).argmax(axis=1).max())
    return ids[:, : -(-length // 8) * 8]


def _tokenize(tokenizers: Tokenizers, text: str) -> tuple[list[int], list[int]]:
    return tokenizers.clip.encode(text), tokenizers.t5.encode(text)
