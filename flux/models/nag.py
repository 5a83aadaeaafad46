"""Normalized attention guidance (NAG): away from a negative prompt within attention (Chen et al. 2025).

The sequence holds both texts, positive, negative, picture. Everything but attention acts on tokens one by
one, so that the network runs once; in attention the picture attends to each text by itself, and leaves
the negative one. So a negative prompt also has an effect in a few steps, where true guidance breaks down.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from flux.errors import FluxError
from flux.models.layers import attention
from flux.models.transformer import ModulationVectors

SMALLEST = 1e-20  # what a norm is divided by at least

Sum = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class Nag:
    """How strongly the picture is led away from the negative prompt.

    scale: of the step from what it finds in the negative text to what it finds in the positive, above 1.
    tau: how many times as large as the latter the result may become. alpha: its share, in 0..1. Their
    defaults are the authors' for FLUX, with a scale of 5. FluxError, naming the value, for others.
    """

    scale: float
    tau: float = 2.5
    alpha: float = 0.25

    def __post_init__(self) -> None:
        if not 1 < self.scale < math.inf:
            raise FluxError(f"the NAG scale must be above 1 (no effect) and finite, not {self.scale}")
        if not 0 < self.tau < math.inf:
            raise FluxError(f"NAG's tau must be above 0 and finite, not {self.tau}")
        if not 0 < self.alpha <= 1:
            raise FluxError(f"NAG's alpha must be above 0 and at most 1, not {self.alpha}")


def normalized(positive: mx.array, negative: mx.array, nag: Nag, total: Sum) -> mx.array:
    """What attention finds in two texts (B, L, C) as one, of the same shape (Chen et al. 2025, eq. 7 to 10).

    z = z- + scale (z+ - z-), then each token scaled down to an L1 norm of at most tau times that of z+, and
    alpha z + (1 - alpha) z+. total: adds up norms where a token's values lie on several ranks.
    """
    p, n = positive.astype(mx.float32), negative.astype(mx.float32)
    z = n + nag.scale * (p - n)
    norm, most = total(mx.stack([mx.abs(z).sum(-1), nag.tau * mx.abs(p).sum(-1)]))  # (B, L) each
    share = mx.minimum(1, most / mx.maximum(norm, SMALLEST))[..., None]
    return (p + nag.alpha * (share * z - p)).astype(positive.dtype)


@dataclass(frozen=True)
class NagAttention:
    """Takes the place of `attention` in the blocks, for sequences of positive text, negative text, picture.

    lengths: the texts' tokens. total: see `normalized`; the transformer's `over_heads`.
    """

    nag: Nag
    lengths: tuple[int, int]
    total: Sum

    def __call__(self, q: mx.array, k: mx.array, v: mx.array, pe: mx.array) -> mx.array:
        """q, k, v (B, H, Lp+Ln+Li, D), pe their rotary tables -> (B, Lp+Ln+Li, H*D)."""
        positive, negative = self.lengths

        def without_negative(x: mx.array) -> mx.array:
            picture = x[..., positive + negative :, :]
            return mx.concatenate([x[..., :positive, :], picture], axis=-2)

        z_p = attention(*map(without_negative, (q, k, v, pe)))  # (B, Lp+Li, H*D)
        z_n = attention(*(x[..., positive:, :] for x in (q, k, v, pe)))  # (B, Ln+Li, H*D)
        picture = normalized(z_p[:, positive:], z_n[:, negative:], self.nag, self.total)
        return mx.concatenate([z_p[:, :positive], z_n[:, :negative], picture], axis=1)


def join_vectors(
    positive: ModulationVectors, negative: ModulationVectors, lengths: tuple[int, int], picture: int
) -> ModulationVectors:
    """The vectors of each token of positive text, negative text and picture, from those of both prompts.

    The picture's are those of the positive prompt. lengths: the texts' tokens; picture: its tokens.
    """

    def of_tokens(p: mx.array, n: mx.array, after: int = 0) -> mx.array:  # 2 x (B, 1, C) -> (B, L, C)
        runs = zip((p, n, p), (*lengths, after), strict=True)
        return mx.concatenate([mx.repeat(x, count, axis=1) for x, count in runs if count], axis=1)

    double = [
        (of_tokens(txt, negative_txt), img)
        for (txt, img), (negative_txt, _) in zip(positive.double, negative.double, strict=True)
    ]
    single = [of_tokens(p, n, picture) for p, n in zip(positive.single, negative.single, strict=True)]
    return ModulationVectors(double, single, positive.final)
