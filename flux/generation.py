"""Requests -> pictures: the one loop, for the scripts, grids, progress pictures and evaluation.

A picture depends on its request and seed only: it comes out the same alone, among others, or on another
rank. So pictures are denoised one by one: in a batch, sums would be in another order.
"""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from flux import images, sampler
from flux.conditioning import Edit, Picture, PictureConditioning
from flux.conditioning.encoded import NO_PICTURES
from flux.conditioning.redux import appended, blended, check_strength, count_tokens
from flux.denoising import Conditioning, Plan
from flux.distributed.ranks import PATIENCE, Ranks
from flux.errors import FluxError
from flux.jsonfiles import shown
from flux.solvers import SOLVERS

if TYPE_CHECKING:
    from flux.pipeline import FluxPipeline

# Up to so many plans, their modulation takes less memory than the weights that it is made with.
MAX_PLANS = 16

TextKey = tuple[str, str | None, str | None]


class Encoded(NamedTuple):
    """What encoders say of requests, evaluated: of texts, by `ResolvedRequest.texts`, and of pictures."""

    texts: dict[TextKey, Conditioning]
    pictures: Mapping["ResolvedRequest", PictureConditioning] = MappingProxyType({})  # by `.pictures`
    redux: Mapping[Picture, mx.array] = MappingProxyType({})  # the tokens (1, N, C) of each picture

    def conditioning(self, request: "ResolvedRequest") -> Conditioning:
        """A request's texts, the prompt's with the tokens of its pictures; lazily."""
        texts = self.texts[request.texts]
        if not request.redux:
            return texts
        combine = blended if request.redux_blend else appended
        pictures = [(self.redux[picture], strength) for picture, strength in request.redux]
        return texts._replace(positive=combine(texts.positive, pictures))


@dataclass(frozen=True)
class Request:
    """One picture for each seed, all of the same prompt and settings; the model's settings where None.

    image_size: (height, width) in pixels. guidance: FLUX's, an input of the network. cfg_scale: true
    classifier-free guidance, away from `negative_prompt` (empty where None); 1 has no effect. schedule: how
    times are laid, see `sampler.timesteps`. clip_prompt: what CLIP reads, where it is not the prompt.
    solver: of `flux.solvers.SOLVERS`. edit: a picture that is changed; `image_size` is then what it is fitted
    to, see `Edit.canvas`.
    redux: pictures that FLUX.1 Redux reads beside the prompt, each with its strength, above 0 to 1; they do
    not count for the negative prompt. redux_blend: they are mixed into one, instead of one after the other.
    """

    prompt: str
    seeds: tuple[int, ...] = (0,)
    negative_prompt: str | None = None
    image_size: tuple[int, int] | None = None
    steps: int | None = None
    guidance: float | None = None
    cfg_scale: float | None = None
    schedule: str = "model"
    clip_prompt: str | None = None
    edit: Edit | None = None
    solver: str = "euler"
    redux: tuple[tuple[Picture, float], ...] = ()
    redux_blend: bool = False

    def resolved(self, pipeline: "FluxPipeline") -> "ResolvedRequest":
        """The request with every setting filled in, of a size that the model can make.

        Warns of a size that is rounded, and of guidance that has no effect. FluxError, naming the value, for
        settings that make no picture.
        """
        spec = pipeline.spec
        image_size, size = self._sizes(pipeline)
        request = ResolvedRequest(
            prompt=self.prompt,
            seeds=self.seeds,
            negative_prompt=self.negative_prompt,
            image_size=image_size,
            steps=spec.steps if self.steps is None else self.steps,
            guidance=spec.guidance if self.guidance is None else self.guidance,
            cfg_scale=spec.cfg_scale if self.cfg_scale is None else self.cfg_scale,
            latent_size=size,
            schedule=self.schedule,
            clip_prompt=self.clip_prompt,
            edit=self.edit,
            solver=self.solver,
            redux=self.redux,
            redux_blend=self.redux_blend,
        )
        request.check()
        pipeline.check_memory(size, request.steps, count_tokens(pipeline.redux, self.redux, self.redux_blend))
        if request.guidance != spec.guidance and not pipeline.flow.params.guidance_embed:
            text = f"{spec.name} takes no guidance; {request.guidance} has no effect"
            warnings.warn(text, stacklevel=1)  # of this line, so that it is shown once
        return request

    def _sizes(self, pipeline: "FluxPipeline") -> tuple[tuple[int, int], tuple[int, int]]:
        """`image_size`, as it can be made, and the latent's; each (height, width)."""
        best = pipeline.spec.image_size
        if self.edit is None:
            h, w = pipeline.latent_size(self.image_size or best)
            return (pipeline.downscale * h, pipeline.downscale * w), (h, w)
        height, width = self.image_size or self.edit.default_size(best)
        image_size = (height, width)  # also where a list was given
        return image_size, pipeline.latent_size(pipeline.canvas(self.edit, image_size).picture.shape[:2])


@dataclass(frozen=True, kw_only=True)
class ResolvedRequest(Request):
    """A request with every setting filled in for a model; made by `Request.resolved`."""

    image_size: tuple[int, int]
    steps: int
    guidance: float
    cfg_scale: float
    latent_size: tuple[int, int]

    @property
    def made_steps(self) -> int:
        """The steps that are made of `steps`: fewer where a picture is the start."""
        return len(sampler.from_strength([0.0] * (self.steps + 1), self.strength)) - 1

    def made_size(self, pipeline: "FluxPipeline") -> tuple[int, int]:
        """(height, width) of the pictures, in pixels: `image_size`, unless another picture is changed."""
        if self.edit is None:
            return self.image_size
        height, width, _ = pipeline.canvas(self.edit, self.image_size).whole.shape
        return height, width

    @property
    def strength(self) -> float:
        """The share of the steps that are made."""
        return 1.0 if self.edit is None else self.edit.strength

    @property
    def has_pictures(self) -> bool:
        """Whether a picture says something to the transformer or the sampler."""
        return self.edit is not None

    @property
    def pictures(self) -> "ResolvedRequest":
        """What the pictures that are encoded depend on: the request without its prompts and seeds."""
        return replace(self, prompt="", negative_prompt=None, clip_prompt=None, seeds=(), redux=())

    @property
    def texts(self) -> TextKey:
        """What is encoded: the prompt, with true guidance the negative prompt, and a text for CLIP alone."""
        return self.prompt, None if self.cfg_scale == 1 else self.negative_prompt or "", self.clip_prompt

    def resolved(self, pipeline: "FluxPipeline") -> "ResolvedRequest":
        """The request itself."""
        return self

    def check(self) -> None:
        """FluxError, naming the value, where no picture can be made."""
        if self.steps < 1:
            raise FluxError(f"steps must be at least 1, not {self.steps}")
        if not self.seeds:
            raise FluxError("the number of pictures must be at least 1, not 0")
        if self.cfg_scale < 1:
            raise FluxError(f"the cfg scale must be at least 1 (no effect), not {self.cfg_scale}")
        if self.negative_prompt and self.cfg_scale == 1:
            text = shown(self.negative_prompt)
            raise FluxError(f"the negative prompt {text} needs a cfg scale above 1 to have an effect")
        if self.solver not in SOLVERS:
            raise FluxError(f"the solver must be one of {', '.join(SOLVERS)}, not {self.solver!r}")
        sampler.check_seeds(self.seeds)
        for picture, strength in self.redux:
            check_strength(picture.name, strength)


# What is called after each step with the request of one picture, the step (from 0) and its latent (1, L, C).
OnStep = Callable[[ResolvedRequest, int, mx.array], None]
Denoise = Callable[[ResolvedRequest], mx.array]  # from a request of one picture to its latent


def split(requests: Iterable[ResolvedRequest], size: int) -> list[ResolvedRequest]:
    """The same pictures in the same order, at most `size` of them in a request."""
    return [
        replace(request, seeds=request.seeds[start : start + size])
        for request in requests
        for start in range(0, len(request.seeds), size)
    ]


class Stages:
    """Times and peak memory of the stages: `with stages("decode"): ...`."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, float]] = []  # name, seconds, GB

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        mx.reset_peak_memory()
        start = time.perf_counter()
        yield
        self.rows.append((name, time.perf_counter() - start, mx.get_peak_memory() / 1e9))

    def __str__(self) -> str:
        rows = [f"{name:8} {seconds:9.2f} {memory:9.3f}" for name, seconds, memory in self.rows]
        return "\n".join([f"{'stage':8} {'seconds':>9} {'peak GB':>9}", *rows])


# --- Stages ---


def encode(pipeline: "FluxPipeline", requests: Iterable[ResolvedRequest]) -> Encoded:
    """What the encoders say of resolved requests, evaluated; each text and picture is encoded once."""
    requests = list(requests)
    texts = {
        request.texts: pipeline.encode(
            request.prompt, request.negative_prompt, request.cfg_scale, request.clip_prompt
        )
        for request in {request.texts: request for request in requests}.values()
    }
    pictures = {
        request: pipeline.encode_pictures(request)
        for request in dict.fromkeys(request.pictures for request in requests)
        if request.has_pictures
    }
    read = pipeline.redux
    given = dict.fromkeys(picture for request in requests for picture, _ in request.redux)
    tokens = {} if read is None else {picture: read(picture) for picture in given}
    mx.eval(texts, list(pictures.values()), list(tokens.values()))
    return Encoded(texts, pictures, tokens)


def denoiser(
    pipeline: "FluxPipeline",
    requests: Sequence[ResolvedRequest],
    encoded: Encoded,
    on_step: OnStep | None = None,
    keep_modulation: bool = True,
) -> Denoise:
    """A function from a request of one picture, one of these, to its finished latent (1, L, channels).

    keep_modulation: False takes a quarter of the transformer's weights out of memory, where the requests
    are so few that their modulation takes less.
    """
    plans = dict.fromkeys(replace(request, seeds=()) for request in requests)  # in an order that ranks share
    ahead = not keep_modulation and len(plans) <= MAX_PLANS

    @lru_cache(maxsize=max(1, len(plans)) if ahead else 1)
    def plan(request: ResolvedRequest) -> Plan:
        return pipeline.prepare(
            conditioning=encoded.conditioning(request),
            noise=None,
            latent_size=request.latent_size,
            num_steps=request.steps,
            guidance=request.guidance,
            cfg_scale=request.cfg_scale,
            schedule=request.schedule,
            pictures=encoded.pictures.get(request.pictures, NO_PICTURES),
            strength=request.strength,
            solver=request.solver,
        )

    if ahead:
        mx.eval([plan(request) for request in plans])
        pipeline.flow.drop_modulation()

    def denoise(request: ResolvedRequest) -> mx.array:
        noise = pipeline.noise(request.seeds, request.latent_size)
        whole = plan(replace(request, seeds=()))._replace(x=noise)
        x = whole.pictures.start(noise, whole.times[0])  # finished, where a picture is not to be changed
        for step, x in enumerate(pipeline.denoise(whole)):
            mx.eval(x)
            check_finite(x, f"step {step + 1} of the transformer")
            if on_step is not None:
                on_step(request, step, x)
        return x

    return denoise


def denoise(
    pipeline: "FluxPipeline",
    requests: Sequence[ResolvedRequest],
    encoded: Encoded,
    on_step: OnStep | None = None,
) -> list[mx.array]:
    """The finished latents (1, L, channels) of resolved requests, by request and seed."""
    return list(map(denoiser(pipeline, requests, encoded, on_step), split(requests, 1)))


def decode(pipeline: "FluxPipeline", request: ResolvedRequest, latents: Sequence[mx.array]) -> np.ndarray:
    """Latents (1, L, channels) of a resolved request, decoded at once -> (B, H, W, 3), uint8."""
    pictures = pipeline.decode(mx.concatenate(list(latents)), request.latent_size)
    check_finite(pictures, "the autoencoder")
    made = images.to_uint8(pictures)
    if request.edit is None:
        return made
    canvas = pipeline.canvas(request.edit, request.image_size)
    return np.stack([canvas.compose(picture) for picture in made])


def check_finite(array: mx.array, where: str) -> None:
    """FluxError for NaN or infinity, which would be a black picture. where: what has computed the array."""
    if not mx.isfinite(array).all().item():
        raise FluxError(
            f"{where} gives NaN or infinity: weights or an adapter hold such numbers, "
            "a strength is too high, or float16 is too narrow for them"
        )


# --- All of them ---


def generate(
    pipeline: "FluxPipeline",
    requests: Iterable[Request],
    ranks: Ranks | None = None,
    on_step: OnStep | None = None,
    *,
    decoding_batch_size: int = 1,
    stream: bool = False,
    keep_models: bool = False,
    progress: bool = False,
    stages: Stages | None = None,
) -> Iterator[np.ndarray]:
    """Yield the pictures (H, W, 3), uint8, of each request's seeds in turn.

    ranks: share out the pictures or, with `model_parallel`, the networks, which are then split already. Rank
    0 alone yields pictures; all others must take part and yield none.
    on_step: called on the rank that makes the picture, after each of its steps.
    decoding_batch_size: how many pictures of a request are decoded at once.
    stream: yield pictures as soon as they are made, with transformer and autoencoder in memory together.
    Otherwise all are denoised, and then all decoded, so that one stage is in memory at a time.
    keep_models: leave everything in memory. Otherwise the text encoders, the transformer's modulation and,
    unless streaming, the transformer are taken out of the pipeline, which can then make no other picture.
    progress: show a bar of rank 0's steps. stages: collects times and peak memory.
    FluxError, before any work, for settings that make no picture. Warns of what a small model does not know.
    """
    resolved = [request.resolved(pipeline) for request in requests]
    if pipeline.known_words is not None:
        pipeline.known_words.warn((request.prompt, request.image_size) for request in resolved)
    run = _Run(pipeline, ranks or Ranks.alone(), on_step, keep_models, progress, stages or Stages())
    batches = split(resolved, decoding_batch_size)
    return run.streamed(batches) if stream else run.by_stages(batches)


@dataclass(frozen=True)
class _Run:
    """What `generate` is given besides requests."""

    pipeline: "FluxPipeline"
    ranks: Ranks
    on_step: OnStep | None
    keep_models: bool
    progress: bool
    stages: Stages

    def by_stages(self, batches: list[ResolvedRequest]) -> Iterator[np.ndarray]:
        """Denoise all, one by one; then decode all, batch by batch."""
        ranks, singles = self.ranks, split(batches, 1)
        encoded = self._encode(singles)
        with self.stages("denoise"), self._denoiser(singles, encoded) as denoise:
            latents = iter(list(ranks.map(denoise, singles)))
        if not self.keep_models:
            del self.pipeline.flow
            mx.clear_cache()
        if ranks.model_parallel and not ranks.is_rank_zero:
            return
        work = [(batch, list(islice(latents, len(batch.seeds)))) for batch in batches]
        with self.stages("decode"):
            # Where the model is split, this rank is here alone.
            decoded = map(self._decode, work) if ranks.model_parallel else ranks.map(self._decode, work)
            for pictures in decoded:
                if ranks.is_rank_zero:
                    yield from np.array(pictures)

    def streamed(self, batches: list[ResolvedRequest]) -> Iterator[np.ndarray]:
        """Denoise and decode batch by batch."""
        ranks = self.ranks
        encoded = self._encode(batches)
        with self.stages("pictures"), self._denoiser(batches, encoded) as denoise:

            def work(batch: ResolvedRequest) -> mx.array:
                latents = [denoise(single) for single in split([batch], 1)]
                decodes = ranks.is_rank_zero or not ranks.model_parallel
                return self._decode((batch, latents)) if decodes else mx.zeros((0,))

            for pictures in ranks.map(work, batches):
                if ranks.is_rank_zero:
                    yield from np.array(pictures)

    def _encode(self, items: list[ResolvedRequest]) -> Encoded:
        """What the encoders say of the items that this rank works on."""
        with self.ranks.waiting(len(items) * PATIENCE), self.stages("text"):
            encoded = encode(self.pipeline, self.ranks.local_items(items))
        if not self.keep_models:
            del self.pipeline.t5, self.pipeline.clip
            self.pipeline.redux = None
            mx.clear_cache()
        return encoded

    @contextmanager
    def _denoiser(
        self, items: list[ResolvedRequest], encoded: Encoded
    ) -> Iterator[Callable[[ResolvedRequest], mx.array]]:
        """`denoiser`, while a bar shows the steps of the items that this rank works on."""
        local = self.ranks.local_items(items)
        total = sum(item.made_steps * len(item.seeds) for item in local)
        shown = self.progress and self.ranks.is_rank_zero
        with tqdm(total=total, unit="step", disable=None if shown else True) as bar:

            def on_step(request: ResolvedRequest, step: int, x: mx.array) -> None:
                bar.update()
                if self.on_step is not None:
                    self.on_step(request, step, x)

            yield denoiser(self.pipeline, local, encoded, on_step, self.keep_models)

    def _decode(self, work: tuple[ResolvedRequest, list[mx.array]]) -> mx.array:
        """The pictures (B, H, W, 3), uint8, of a batch and its latents."""
        return mx.array(decode(self.pipeline, *work))
