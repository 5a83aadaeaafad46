"""An adapter as data: what it changes in which module. Knows neither file formats nor networks.

Modules have the names of our own networks: BFL's for the transformer, transformers' for the text encoders.
The three sets of names have nothing in common, so one dictionary holds them all.
"""

import math
from dataclasses import dataclass, field, replace

import mlx.core as mx


@dataclass(frozen=True, eq=False)
class LowRank:
    """dW = (alpha / r) up @ down (Hu et al. 2021); down (r, in), up (out, r)."""

    down: mx.array
    up: mx.array
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    def dense(self) -> mx.array:
        """dW (out, in) in float32."""
        return self.scale * (self.up.astype(mx.float32) @ self.down.astype(mx.float32))


@dataclass(frozen=True, eq=False)
class Kronecker:
    """dW = scale kron(w1, w2) (LoKr, Yeh et al. 2023); w1 (a, b), w2 (c, d), dW (a*c, b*d)."""

    w1: mx.array
    w2: mx.array
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.w1.shape[0] * self.w2.shape[0], self.w1.shape[1] * self.w2.shape[1]

    def dense(self) -> mx.array:
        """dW (out, in) in float32."""
        return self.scale * mx.kron(self.w1.astype(mx.float32), self.w2.astype(mx.float32))


@dataclass(frozen=True, eq=False)
class Dense:
    """dW itself, (out, in): for changes of no low rank, and for LoKr under diffusers' split names."""

    weight: mx.array

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape

    def dense(self) -> mx.array:
        """dW (out, in) in float32."""
        return self.weight.astype(mx.float32)


Change = LowRank | Kronecker | Dense


@dataclass(frozen=True, eq=False)
class Delta:
    """All that an adapter does to one Linear at strength 1. Everything in it is along the rows of the weight.

    bias (out,) is added to the layer's. magnitude (out,) makes it a DoRA (Liu et al. 2024):
    W' = magnitude (W + dW) / row norms of (W + dW); NaN where a row has none and W' = W + dW.
    """

    change: Change | None = None
    bias: mx.array | None = None
    magnitude: mx.array | None = None

    @property
    def shape(self) -> tuple[int | None, int | None]:
        """(out, in); (out, None) where only the bias changes."""
        if self.change is not None:
            return self.change.shape
        return (None if self.bias is None else self.bias.shape[0]), None


# How the first part of a module's name tells its network.
PARTS = {"clip": "text_model.", "t5": "encoder.block."}


def part_of(module: str) -> str:
    """The network that a module belongs to: "flux", "clip" or "t5"."""
    return next((part for part, start in PARTS.items() if module.startswith(start)), "flux")


@dataclass(frozen=True, eq=False)
class Adapter:
    """A whole adapter.

    modules: module's name -> Delta. replaced, added: a norm's parameter name -> its new value, or what is
    added to it. metadata: the file's. format: of the file it came from. homeless: the file's keys that found
    no home, with the reason where it is not the name.
    """

    modules: dict[str, Delta]
    replaced: dict[str, mx.array] = field(default_factory=dict)
    added: dict[str, mx.array] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    format: str = "native"
    homeless: list[str] = field(default_factory=list)

    def part(self, part: str) -> "Adapter":
        """What of it belongs to one network: "flux", "clip" or "t5"."""

        def own(names: dict) -> dict:
            return {name: value for name, value in names.items() if part_of(name) == part}

        return replace(self, modules=own(self.modules), replaced=own(self.replaced), added=own(self.added))

    def parts(self) -> list[str]:
        """The networks that it changes, in the order flux, clip, t5."""
        names = {part_of(name) for names in (self.modules, self.replaced, self.added) for name in names}
        return [part for part in ("flux", "clip", "t5") if part in names]

    def ranks(self) -> dict[str, int]:
        """The rank of every low-rank change."""
        return {n: d.change.rank for n, d in self.modules.items() if isinstance(d.change, LowRank)}

    def alphas(self) -> dict[str, float]:
        """The alpha of every low-rank change."""
        return {n: d.change.alpha for n, d in self.modules.items() if isinstance(d.change, LowRank)}


def fold(scale: float, first: mx.array, second: mx.array) -> tuple[mx.array, mx.array]:
    """Two factors of a product that take its scale into themselves, evenly.

    A power of two is split in whole powers, which keeps every bit in every type; any other scale would lose
    bits in a 16-bit type, so the factors become float32.
    """
    mantissa, exponent = math.frexp(scale)
    if mantissa == 0.5:
        half = (exponent - 1) // 2
        return first * 2.0**half, second * 2.0 ** (exponent - 1 - half)
    root = math.sqrt(abs(scale))
    return first.astype(mx.float32) * root, second.astype(mx.float32) * math.copysign(root, scale)


def folded(change: LowRank) -> LowRank:
    """The same dW with alpha equal to the rank."""
    if change.scale == 1.0:
        return change
    up, down = fold(change.scale, change.up, change.down)
    return LowRank(down, up, change.rank)
