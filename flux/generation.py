"""Requests -> pictures: the one loop, for the scripts, grids, progress pictures and evaluation.

A picture depends on its request and seed only: it comes out the same alone, among others, or on another
rank. So pictures are denoised one by one: in a batch, sums would be in another order.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from flux import images, sampler
from flux.conditioning.encoded import NO_PICTURES
from flux.denoising import Plan
from flux.distributed.ranks import PATIENCE, Ranks
from flux.encoding import Encoded, encode
from flux.errors import FluxError
from flux.requests import Request, ResolvedRequest
from flux.stages import Stages
from flux.step_cache import StepCache

if TYPE_CHECKING:
    from flux.pipeline import FluxPipeline

# Up to so many plans, their modulation takes less memory than the weights that it is made with.
MAX_PLANS = 16


# What is called after each step with the request of one picture, the step (from 0) and its latent (1, L, C).
OnStep = Callable[[ResolvedRequest, int, mx.array], None]  # or of the picture that it is on the way to
Denoise = Callable[[ResolvedRequest], mx.array]  # from a request of one picture to its latent


def split(requests: Iterable[ResolvedRequest], size: int) -> list[ResolvedRequest]:
    """The same pictures in the same order, at most `size` of them in a request."""
    return [
        replace(request, seeds=request.seeds[start : start + size])
        for request in requests
        for start in range(0, len(request.seeds), size)
    ]


# --- Stages ---


def denoiser(
    pipeline: "FluxPipeline",
    requests: Sequence[ResolvedRequest],
    encoded: Encoded,
    on_step: OnStep | None = None,
    keep_modulation: bool = True,
    on_estimate: OnStep | None = None,
) -> Denoise:
    """A function from a request of one picture, one of these, to its finished latent (1, L, channels).

    keep_modulation: False takes a quarter of the transformer's weights out of memory, where the requests
    are so few that their modulation takes less. on_estimate: as `on_step`, see `generate`.
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
            controlnets=request.controlnets,
            solver=request.solver,
        )

    if ahead:
        mx.eval([plan(request) for request in plans])
        for network in (pipeline.flow, *pipeline.controlnets.networks):
            network.drop_modulation()

    def denoise(request: ResolvedRequest) -> mx.array:
        noise = pipeline.noise(request.seeds, request.latent_size)
        guide = None if request.guide is None else request.guide.bound(pipeline.ae, request.latent_size)
        cache = None if request.cache is None else StepCache(request.cache, pipeline.block_count)
        whole = plan(replace(request, seeds=()))._replace(
            x=noise, cfg_end=request.cfg_end, nag=request.nag, guide=guide, cache=cache
        )
        x = whole.pictures.start(noise, whole.times[0])  # finished, where a picture is not to be changed
        for step, x_next in enumerate(pipeline.denoise(whole)):
            mx.eval(x_next)
            check_finite(x_next, f"step {step + 1} of the transformer")
            if on_step is not None:
                on_step(request, step, x_next)
            if on_estimate is not None:
                on_estimate(request, step, sampler.estimate(x, x_next, *whole.times[step : step + 2]))
            x = x_next
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
    on_estimate: OnStep | None = None,
    keep_finished: bool = False,
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
    on_estimate: as `on_step`, but with the model's estimate of the finished latent, not yet evaluated.
    keep_finished: where Ctrl-C ends denoising, yield the pictures that are finished before KeyboardInterrupt
    is raised; not with several ranks, nor streaming, where they were yielded already.
    FluxError, before any work, for settings that make no picture. Warns of what a small model does not know.
    """
    resolved = [request.resolved(pipeline) for request in requests]
    if pipeline.known_words is not None:
        side = (
            pipeline.downscale
        )  # the model sees an expanded picture, or the crop, not the one that is given
        made = ((r.prompt, (side * r.latent_size[0], side * r.latent_size[1])) for r in resolved)
        pipeline.known_words.warn(made)
    ranks, stages = ranks or Ranks.alone(), stages or Stages()
    run = _Run(pipeline, ranks, on_step, keep_models, progress, stages, on_estimate, keep_finished)
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
    on_estimate: OnStep | None
    keep_finished: bool

    def by_stages(self, batches: list[ResolvedRequest]) -> Iterator[np.ndarray]:
        """Denoise all, one by one; then decode all, batch by batch."""
        ranks, singles = self.ranks, split(batches, 1)
        encoded = self._encode(singles)
        interrupt = None
        finished: list[mx.array] = []
        with self.stages("denoise"), self._denoiser(singles, encoded) as denoise:
            try:
                finished.extend(ranks.map(denoise, singles))
            except KeyboardInterrupt as error:
                if not (self.keep_finished and ranks.size == 1):
                    raise
                interrupt = error
        latents = iter(finished)
        if not self.keep_models:
            del self.pipeline.flow, self.pipeline.controlnets
            mx.clear_cache()
        if ranks.model_parallel and not ranks.is_rank_zero:
            return
        work = [(batch, made) for batch in batches if (made := list(islice(latents, len(batch.seeds))))]
        with self.stages("decode"):
            # Where the model is split, this rank is here alone.
            decoded = map(self._decode, work) if ranks.model_parallel else ranks.map(self._decode, work)
            for pictures in decoded:
                if ranks.is_rank_zero:
                    yield from np.array(pictures)
        if interrupt is not None:
            raise interrupt

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

            yield denoiser(self.pipeline, local, encoded, on_step, self.keep_models, self.on_estimate)

    def _decode(self, work: tuple[ResolvedRequest, list[mx.array]]) -> mx.array:
        """The pictures (B, H, W, 3), uint8, of a batch and its latents."""
        return mx.array(decode(self.pipeline, *work))
