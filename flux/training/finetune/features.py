"""What the encoders make of a data set: computed once, kept on disk, read batch by batch."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from flux import machine
from flux.conditioning import encode_texts, warn_if_cut
from flux.data import latents as data
from flux.data.epochs import Batch, Plan
from flux.pipeline import Conditioning, FluxPipeline, TextConditioning

Tensors = dict[str, mx.array]


class Features:
    """Latents and texts of a training. clip_ids: CLIP is trained, so its tokens take its vector's place."""

    def __init__(self, plan: Plan, cache: data.Cache, identities: tuple[str, str], clip_ids: bool = False):
        """identities: of the autoencoder and of the text encoders."""
        self.plan = plan
        self.clip_ids = clip_ids
        self._latents = data.Latents(cache, identities[0], plan.seed)
        self._texts = data.Texts(cache, f"{identities[1]} {'ids' if clip_ids else 'pooled'}")

    def missing_pictures(self) -> list:
        """(picture, repeat) without latents."""
        return self._latents.missing(self.plan.variants())

    def missing_texts(self, texts: Iterable[str]) -> list[str]:
        return self._texts.missing(texts)

    def encode_pictures(self, pipeline: FluxPipeline, wanted: Sequence, quiet: bool) -> None:
        moments = partial(pipeline.ae.moments, memory=machine.autoencoder_memory())
        for placed, repeat in tqdm(wanted, "encoding pictures", disable=quiet or None):
            self._latents.encode(placed, repeat, moments)

    def encode_texts(self, pipeline: FluxPipeline, wanted: Sequence[str], quiet: bool) -> None:
        encode = self._text_encoder(pipeline)
        for text in tqdm(wanted, "encoding texts", disable=quiet or None):
            self._texts.encode(text, encode)

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

    def batch(self, batch: Batch, key: Callable[[int], np.ndarray]) -> Tensors:
        """The arrays of a batch, with a random key for each entry's position: see `objective.FlowLoss`."""
        arrays = data.assemble(batch, self._latents, self._texts, self.plan.masked)
        return arrays | {"keys": mx.array(np.stack([key(entry.position) for entry in batch.entries]))}

    def conditioning(
        self, text: str, negative: str | None, pooled: Callable[[mx.array], mx.array]
    ) -> Conditioning:
        """A prompt, and maybe a negative one. pooled: CLIP, if it is trained: ids (1, 77) -> (1, D)."""

        def one(text: str) -> TextConditioning:
            found = {name: array[None] for name, array in self._texts.load(text).items()}
            clip = pooled(found["clip_ids"]) if self.clip_ids else found["clip"]
            return TextConditioning(found["t5"], clip)

        return Conditioning(one(text), None if negative is None else one(negative))


def sample_key(seed: int, position: int) -> np.ndarray:
    """The random key (2,) of the sample at this place in the training: the same in any batch, on any rank."""
    return np.array([seed, position], np.uint32)
