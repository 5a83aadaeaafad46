"""What the encoders make of a data set: computed once, kept on disk, read batch by batch."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any

import mlx.core as mx
import numpy as np

from flux import machine
from flux.conditioning import encode_texts, warn_if_cut
from flux.data import cache as data
from flux.data.batches import Batch, Plan
from flux.distributed.ranks import Ranks
from flux.pipeline import Conditioning, FluxPipeline, TextConditioning
from flux.training.console import Console
from flux.training.trainer import sample_key

Tensors = dict[str, mx.array]


class Features:
    """Latents and texts of a training. clip_ids: CLIP is trained, so its tokens take its vector's place."""

    def __init__(self, plan: Plan, cache: data.Cache, identities: tuple[str, str], clip_ids: bool = False):
        """identities: of the autoencoder and of the text encoders."""
        self.plan = plan
        self.clip_ids = clip_ids
        self._latents = data.Latents(cache, identities[0], plan.seed)
        self._texts = data.Texts(cache, f"{identities[1]} {'ids' if clip_ids else 'pooled'}")

    def encode(self, pipeline: FluxPipeline, texts: Iterable[str], ranks: Ranks, console: Console) -> None:
        """Fills the cache: each picture of the plan and each text is encoded by one rank, for all of them."""
        autoencoder = partial(pipeline.ae.moments, memory=machine.autoencoder_memory())
        text_encoder = self._text_encoder(pipeline)
        self._fill(
            "encoding pictures",
            self._latents,
            self.plan.variants(),
            lambda item: self._latents.encode(item[0], item[1], autoencoder),
            ranks,
            console,
        )
        self._fill(
            "encoding texts",
            self._texts,
            list(dict.fromkeys(texts)),
            lambda item: self._texts.encode(item, text_encoder),
            ranks,
            console,
        )

    def _fill(
        self,
        title: str,
        store: data.Store,
        items: Sequence,
        encode: Callable[[Any], None],
        ranks: Ranks,
        console: Console,
    ) -> None:
        """Encodes what no rank has, and gives each what it lacks: the ranks need not share a disk."""
        missing = set(store.missing(items))
        lacking = ranks.gather([i for i, item in enumerate(items) if item in missing])

        def give(number: int | None) -> mx.array:
            if number is None:
                return mx.zeros((0,), mx.uint8)
            item = items[number]
            if item in missing:
                encode(item)
            return mx.array(np.frombuffer(store.content(item), np.uint8))

        turns = who_gives(lacking)
        contents = console.track(ranks.map(give, turns), title, len(turns))
        for number, content in zip(turns, contents, strict=True):
            # Where the disk is the same, it is there by now.
            if number is not None and items[number] in missing and store.missing([items[number]]):
                store.add(items[number], np.array(content).tobytes())

    def _text_encoder(self, pipeline: FluxPipeline) -> Callable[[str], Tensors]:
        parts = (pipeline.t5, pipeline.clip, pipeline.t5_tokenizer, pipeline.clip_tokenizer)

        def pooled(text: str) -> Tensors:
            found = encode_texts([text], *parts)
            return {"t5": found.t5[0], "clip": found.clip[0]}  # (L, C), (D,)

        def ids(text: str) -> Tensors:
            t5, _, t5_tokenizer, clip_tokenizer = parts
            warn_if_cut(text, t5_tokenizer, clip_tokenizer)
            return {"t5": t5(t5_tokenizer([text]))[0], "clip_ids": clip_tokenizer([text])[0]}  # (L, C), (77,)

        return ids if self.clip_ids else pooled

    def batch(self, batch: Batch, seed: int) -> Tensors:
        """The arrays of a batch, with a random key of this seed for each entry: see `FlowLoss`."""
        arrays = data.assemble(batch, self._latents, self._texts, self.plan.masked)
        return arrays | {"keys": mx.stack([sample_key(seed, entry.position) for entry in batch.entries])}

    def conditioning(
        self, text: str, negative: str | None, pooled: Callable[[mx.array], mx.array]
    ) -> Conditioning:
        """A prompt, and maybe a negative one. pooled: CLIP, if it is trained: ids (1, 77) -> (1, D)."""

        def one(text: str) -> TextConditioning:
            found = {name: array[None] for name, array in self._texts.load(text).items()}
            clip = pooled(found["clip_ids"]) if self.clip_ids else found["clip"]
            return TextConditioning(found["t5"], clip)

        return Conditioning(one(text), None if negative is None else one(negative))


def who_gives(lacking: Sequence[Sequence[int]]) -> list[int | None]:
    """Which item each rank gives the others, rank by rank and turn by turn; None: no more of this rank.

    lacking: the items that each rank lacks. An item is given by the first who has it; what nobody has is
    dealt out, to be encoded.
    """
    queues: list[list[int]] = [[] for _ in lacking]
    lacked = [set(items) for items in lacking]
    for number in sorted(set().union(*lacked)):
        having = [rank for rank, items in enumerate(lacked) if number not in items]
        (queues[having[0]] if having else min(queues, key=len)).append(number)
    return [number for turn in zip_longest(*queues) for number in turn]
