"""A step cache: most blocks are skipped in steps where the first block does nearly what it did before.

What the first double block adds to the picture's tokens shows how much the step differs from the last one
that was computed whole. Where it differs little, what all other blocks add is extrapolated from the last two
such steps: the test is First Block Cache's, the extrapolation TaylorSeer's of order 1 (Liu et al. 2025).
Nothing is calibrated.
"""

import math
from collections.abc import Hashable
from dataclasses import dataclass, field

import mlx.core as mx

from flux.errors import FluxError
from flux.models.layers import Attend, clip_float16
from flux.models.transformer import Flux, ModulationVectors, Residuals

# Thresholds by name: the relative change of what the first block adds, below which the others are skipped.
# Of the built-in model at 50 steps they leave 1/1.96, 1/2.28 and 1/2.84 of the evaluations of blocks.
LEVELS = {"low": 0.07, "medium": 0.1, "high": 0.2}


@dataclass
class BlockCount:
    """How many evaluations of blocks were to be made, and how many of them were saved."""

    total: int = 0
    saved: int = 0


def check_threshold(threshold: float) -> None:
    """FluxError for a threshold that is negative or not finite."""
    if not 0 <= threshold < math.inf:
        raise FluxError(f"the cache's threshold must be from 0 (no effect) on and finite, not {threshold}")


@dataclass
class Kept:
    """What is kept of a branch's steps that were computed whole; everything in float32.

    first (B, L, C): what the first block added in the latest. others: what the others added, at these times.
    """

    first: mx.array = field(default_factory=lambda: mx.zeros((0,)))
    times: tuple[float, ...] = ()  # of the latest two, the latest last
    others: tuple[mx.array, ...] = ()  # (B, L, C) each

    def keep(self, t: float, first: mx.array, others: mx.array) -> None:
        """Take in a step. One at the latest's time, as of Heun's method, takes its place."""
        before = slice(-2, -1) if self.times[-1:] == (t,) else slice(-1, None)
        self.first = first
        self.times = (*self.times[before], t)
        self.others = (*self.others[before], others)
        mx.eval(self.first, self.others)  # or what they are made from would stay in memory

    def change(self, first: mx.array) -> mx.array:
        """How much of what the first block added is another now, as a share: mean |r - r_k| / mean |r_k|."""
        return mx.abs(first - self.first).mean() / mx.abs(self.first).mean()

    def extrapolated(self, t: float) -> mx.array:
        """What the other blocks add at a time: d_k + (d_k - d_{k-1}) (t - t_k) / (t_k - t_{k-1})."""
        (earlier, latest), (d_earlier, d_latest) = self.times, self.others
        return d_latest + (t - latest) / (latest - earlier) * (d_latest - d_earlier)


@dataclass
class StepCache:
    """Stands for `Flux.denoise` in the steps of one picture.

    threshold: of LEVELS, or another; 0 skips nothing. count: to which its evaluations are added.
    """

    threshold: float
    count: BlockCount = field(default_factory=BlockCount)
    _kept: dict[Hashable, Kept] = field(default_factory=dict)

    def denoise(
        self,
        flow: Flux,
        branch: Hashable,
        t: float,
        tokens: int,
        must_compute: bool,
        img: mx.array,
        txt: mx.array,
        pe: mx.array,
        vectors: ModulationVectors,
        residuals: Residuals | None = None,
        attend: Attend | None = None,
    ) -> mx.array:
        """The velocity as of `Flux.denoise`, or, where blocks are skipped, of the first `tokens` tokens.

        branch: evaluations of one branch are compared with each other alone; the first two of it are
        computed. t: the time. tokens: of the latent, which stand first in img; references do not count.
        must_compute: skip nothing. The others: see `Flux.denoise`. Not to be called within a transformation,
        such as `mx.grad`: what is skipped depends on values.
        """
        told = (pe, vectors, residuals, attend)
        kept = self._kept.setdefault(branch, Kept())
        before = flow.embed_picture(img)
        txt, after = flow.first_block(txt, before, *told)
        first = _added(before, after, tokens)
        skips = not must_compute and self._is_near(flow, kept, first)
        self._add(flow, skips)
        if skips:
            latent = after[:, :tokens]
            x = latent.astype(mx.float32) + kept.extrapolated(t)
            return flow.velocity(clip_float16(x.astype(latent.dtype)), vectors)
        x = flow.other_blocks(txt, after, *told)
        kept.keep(t, first, _added(after, x, tokens))
        return flow.velocity(x, vectors)

    def _is_near(self, flow: Flux, kept: Kept, first: mx.array) -> bool:
        """Whether the latest step that was computed is near enough, on every rank of a model that is split.

        Each rank that says no counts 1: a sum that is the same in any order.
        """
        if len(kept.times) < 2:
            return False
        is_far = mx.logical_not(kept.change(first) < self.threshold)  # also where it is NaN
        return flow.over_heads(is_far.astype(mx.float32)).item() == 0

    def _add(self, flow: Flux, skips: bool) -> None:
        blocks = len(flow.double_blocks) + len(flow.single_blocks)
        self.count.total += blocks
        self.count.saved += skips * (blocks - len(flow.double_blocks[:1]))


def _added(before: mx.array, after: mx.array, tokens: int) -> mx.array:
    """What was added to the first tokens of (B, Li, C) -> (B, tokens, C), float32."""
    return after[:, :tokens].astype(mx.float32) - before[:, :tokens].astype(mx.float32)
