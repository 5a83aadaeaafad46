"""What an adapter does to one weight W (out, in), as data: each kind gives W' - W.

Kinds that add the same matrix to every W have `dense`; the others (GLoRA, scaling, rotation, replacement)
need W. All formulas run in float32. Nothing here knows files or layers.
"""

import math
from dataclasses import dataclass, replace

import mlx.core as mx


class Additive:
    """A change that is the same matrix for every weight."""

    def dense(self) -> mx.array:
        """dW (out, in) in float32."""
        raise NotImplementedError

    def delta(self, weight: mx.array, strength: float = 1.0) -> mx.array:
        """W' - W (out, in) in float32 for W (out, in)."""
        return strength * self.dense()


def _product(*factors: mx.array) -> mx.array:
    """The matrix product in float32."""
    first, *others = (factor.astype(mx.float32) for factor in factors)
    for factor in others:
        first = first @ factor
    return first


@dataclass(frozen=True, eq=False)
class LowRank(Additive):
    """dW = (alpha / r) up @ down (Hu et al. 2021); down (r, in), up (out, r)."""

    down: mx.array
    up: mx.array
    alpha: float

    @property
    def rank(self) -> int:
        """r."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.up.shape[0], self.down.shape[1]

    def dense(self) -> mx.array:
        """dW (out, in) in float32."""
        return self.scale * _product(self.up, self.down)


@dataclass(frozen=True, eq=False)
class Hadamard(Additive):
    """dW = scale (a1 @ b1) * (a2 @ b2) (LoHa, Hyeon-Woo et al. 2021); a (out, r), b (r, in)."""

    a1: mx.array
    b1: mx.array
    a2: mx.array
    b2: mx.array
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.a1.shape[0], self.b1.shape[1]

    def dense(self) -> mx.array:
        """dW (out, in) in float32."""
        return self.scale * _product(self.a1, self.b1) * _product(self.a2, self.b2)


@dataclass(frozen=True, eq=False)
class Kronecker(Additive):
    """dW = scale kron(w1, w2) (LoKr, Yeh et al. 2023); w1 (a, b), w2 (c, d), dW (a*c, b*d)."""

    w1: mx.array
    w2: mx.array
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) = (a*c, b*d)."""
        return self.w1.shape[0] * self.w2.shape[0], self.w1.shape[1] * self.w2.shape[1]

    def dense(self) -> mx.array:
        """dW (out, in) in float32."""
        return self.scale * mx.kron(self.w1.astype(mx.float32), self.w2.astype(mx.float32))


@dataclass(frozen=True, eq=False)
class Whole:
    """A change that holds a matrix as large as W, (out, in)."""

    weight: mx.array

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.weight.shape
        return rows, columns


class Dense(Whole, Additive):
    """dW itself: for changes of no low rank."""

    def dense(self) -> mx.array:
        """dW (out, in) in float32."""
        return self.weight.astype(mx.float32)


@dataclass(frozen=True, eq=False)
class GLoRA:
    """dW = scale (W a1 a2 + b1 b2) (Chavan et al. 2023); a1 (in, r), a2 (r, in), b1 (out, r), b2 (r, in)."""

    a1: mx.array
    a2: mx.array
    b1: mx.array
    b2: mx.array
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.b1.shape[0], self.b2.shape[1]

    def delta(self, weight: mx.array, strength: float = 1.0) -> mx.array:
        """W' - W (out, in) in float32 for W (out, in)."""
        return strength * self.scale * (_product(weight, self.a1, self.a2) + _product(self.b1, self.b2))


@dataclass(frozen=True, eq=False)
class Scaling:
    """dW = factor * W, along the rows (factor (out, 1)) or the columns ((1, in)) ((IA)3, Liu et al. 2022)."""

    factor: mx.array

    @property
    def shape(self) -> tuple[int | None, int | None]:
        """(out, in); None for the side that the factor does not show."""
        rows, columns = self.factor.shape
        return (rows, None) if columns == 1 else (None, columns)

    def delta(self, weight: mx.array, strength: float = 1.0) -> mx.array:
        """W' - W (out, in) in float32 for W (out, in)."""
        return strength * self.factor.astype(mx.float32) * weight.astype(mx.float32)


@dataclass(frozen=True, eq=False)
class Rotation:
    """W' = rescale * B W, or W B where `inner`; B is a product of block-diagonal matrices.

    OFT (Qiu et al. 2023) has one of them, BOFT (Liu et al. 2023) some, each with another order of channels.
    blocks (m, n, b, b): the blocks of each, applied to a vector of n*b channels from the first to the last.
    butterfly: before stage i the channels are put in LyCORIS' order, in which blocks mix channels that are
    2^i b / 2 apart, and put back after it. rescale: (out, 1) or None. At a strength s every block is
    s R + (1 - s) I, as in LyCORIS, and so is the rescaling, which LyCORIS leaves whole: at 0 W is W.
    """

    blocks: mx.array
    inner: bool = False
    butterfly: bool = False
    rescale: mx.array | None = None

    @property
    def shape(self) -> tuple[int | None, int | None]:
        """(out, in); None for the side that the blocks do not show."""
        channels = self.blocks.shape[1] * self.blocks.shape[3]
        rows = None if self.rescale is None else self.rescale.shape[0]
        return (rows, channels) if self.inner else (channels, None)

    def turn(self, x: mx.array, strength: float = 1.0) -> mx.array:
        """B x for vectors x (..., n*b), in x's type."""
        number, size = self.blocks.shape[1], self.blocks.shape[3]
        for i, stage in enumerate(self.blocks.astype(mx.float32)):
            stage = strength * stage + (1 - strength) * mx.eye(size)
            apart = 2**i * size // 2
            if self.butterfly:  # (..., c 2 k) -> (..., c k 2)
                x = x.reshape(*x.shape[:-1], -1, 2, apart).swapaxes(-1, -2).flatten(-3)
            x = x.reshape(*x.shape[:-1], number, size)  # (..., n*b) -> (..., n, b)
            x = mx.einsum("nij,...nj->...ni", stage.astype(x.dtype), x).flatten(-2)
            if self.butterfly:
                x = x.reshape(*x.shape[:-1], -1, apart, 2).swapaxes(-1, -2).flatten(-3)
        return x

    def scaled(self, strength: float) -> mx.array:
        """The factor of the rows at a strength: (out, 1), or 1."""
        if self.rescale is None:
            return mx.array(1.0)
        return 1 + strength * (self.rescale.astype(mx.float32) - 1)

    def delta(self, weight: mx.array, strength: float = 1.0) -> mx.array:
        """W' - W (out, in) in float32 for W (out, in)."""
        weight = weight.astype(mx.float32)
        turned = self.transposed().turn(weight, strength) if self.inner else self.turn(weight.T, strength).T
        return self.scaled(strength) * turned - weight

    def transposed(self) -> "Rotation":
        """The same with B transposed: for W B, whose rows are B^T times the rows of W."""
        return replace(self, blocks=self.blocks[::-1].swapaxes(-1, -2))


class Replacement(Whole):
    """W' = weight: a layer that was trained whole."""

    def delta(self, weight: mx.array, strength: float = 1.0) -> mx.array:
        """W' - W (out, in) in float32 for W (out, in)."""
        return strength * (self.weight.astype(mx.float32) - weight.astype(mx.float32))


@dataclass(frozen=True, eq=False)
class Stack:
    """Changes of unlike kinds for parts of a fused layer: (first row, end, what changes these rows)."""

    parts: tuple[tuple[int, int, "Delta"], ...]
    rows: int

    @property
    def shape(self) -> tuple[int, int | None]:
        """(out, in); in is None where no part shows it."""
        columns = [delta.shape[1] for _, _, delta in self.parts if delta.shape[1] is not None]
        return self.rows, columns[0] if columns else None

    @property
    def is_additive(self) -> bool:
        """Whether all parts add the same matrix to every weight."""
        return all(isinstance(d.change, Additive) and d.magnitude is None for *_, d in self.parts)

    def dense(self) -> mx.array:
        """dW (out, in) in float32. ValueError where the parts are not additive."""
        rows, columns = self.shape
        if not self.is_additive or columns is None:
            raise ValueError("a part of the change depends on the base weights")
        return self.delta(mx.zeros((rows, columns)))

    def delta(self, weight: mx.array, strength: float = 1.0) -> mx.array:
        """W' - W (out, in) in float32 for W (out, in)."""
        out = mx.zeros(weight.shape)
        for start, end, delta in self.parts:
            out[start:end] = delta.delta(weight[start:end], strength)
        return out


Change = LowRank | Hadamard | Kronecker | Dense | GLoRA | Scaling | Rotation | Replacement | Stack

# How a DoRA is weighed at a strength s, by the program that wrote it: m (W + s dW) / norms of (W + s dW), or
# (1 + s (m / norms of (W + dW) - 1)) (W + dW). Both are W' at 1; at 0 an adapter is off here, in both.
PEFT, LYCORIS = "peft", "lycoris"


@dataclass(frozen=True, eq=False)
class Delta:
    """All that an adapter does to one Linear.

    bias (out,) is added to the layer's; bias_factor (out,) times the layer's is added as well; new_bias
    (out,) replaces the layer's where it is not NaN.
    magnitude makes it a DoRA (Liu et al. 2024): W' = magnitude (W + dW) / norms of (W + dW). (out,): the
    norms are those of the rows; where it is NaN, W' = W + dW. (1, in): the norms are those of the columns.
    rule: how a DoRA is weighed, PEFT or LYCORIS.
    """

    change: Change | None = None
    bias: mx.array | None = None
    magnitude: mx.array | None = None
    bias_factor: mx.array | None = None
    new_bias: mx.array | None = None
    rule: str = PEFT

    @property
    def shape(self) -> tuple[int | None, int | None]:
        """(out, in), as far as it shows: a bias says nothing about the columns."""
        rows, columns = (None, None) if self.change is None else self.change.shape
        vectors = [v for v in (self.bias, self.bias_factor, self.new_bias) if v is not None]
        return (vectors[0].shape[0] if rows is None and vectors else rows), columns

    def delta(self, weight: mx.array, strength: float = 1.0) -> mx.array:
        """The weight's W' - W (out, in) in float32 for W (out, in)."""
        weight = weight.astype(mx.float32)
        if strength == 0 or self.change is None:
            return mx.zeros_like(weight)
        if self.magnitude is None:
            return self.change.delta(weight, strength)
        new = self._undirected(weight, strength)
        ratio = self.ratio(self.norms(weight, strength), strength)
        return (ratio if ratio.ndim == 2 else ratio[:, None]) * new - weight

    def _undirected(self, weight: mx.array, strength: float) -> mx.array:
        """A DoRA's W + dW in float32, before it gets its magnitude."""
        weight = weight.astype(mx.float32)
        return (
            weight
            if self.change is None
            else weight + self.change.delta(weight, self.inner_strength(strength))
        )

    @property
    def is_of_columns(self) -> bool:
        """Whether it is a DoRA along the columns."""
        return self.magnitude is not None and self.magnitude.ndim == 2

    def inner_strength(self, strength: float) -> float:
        """How strongly dW itself counts in a DoRA of this strength."""
        return strength if self.rule == PEFT else 1.0

    def norms(self, weight: mx.array, strength: float) -> mx.array:
        """A DoRA's norms, float32 in the magnitude's shape; weight (out, in)."""
        new = self._undirected(weight, strength)
        return mx.linalg.norm(new, axis=0, keepdims=True) if self.is_of_columns else row_norms(new)

    def ratio(self, norms: mx.array, strength: float) -> mx.array:
        """What a DoRA multiplies W + dW with at a strength, float32 in the magnitude's shape."""
        magnitude = mx.array(1.0) if self.magnitude is None else self.magnitude.astype(mx.float32)
        ratio = mx.where(mx.isnan(magnitude) | (norms == 0), 1.0, magnitude / norms)  # of zeros: zeros
        return ratio if self.rule == PEFT else 1 + strength * (ratio - 1)

    def widened(self, columns: int) -> "Delta | None":
        """The same for a layer of so many inputs, whose last ones it leaves as they are.

        None where that cannot be: the norms of a DoRA and a change of W itself are of the whole layer.
        """
        change, more = self.change, columns - (self.shape[1] or columns)
        if more == 0:
            return self
        if more < 0 or self.magnitude is not None or not isinstance(change, Additive):
            return None
        right = [(0, 0), (0, more)]
        if isinstance(change, LowRank):
            return replace(self, change=replace(change, down=mx.pad(change.down, right)))
        return replace(self, change=Dense(mx.pad(change.dense(), right)))

    def settled(self, bias: mx.array | None) -> "Delta":
        """The same for a layer with this bias (out,) (None: it has none), as an added bias alone."""
        if self.new_bias is None and self.bias_factor is None:
            return self
        old = mx.zeros((1,)) if bias is None else bias.astype(mx.float32)
        added = mx.zeros((1,)) if self.bias is None else self.bias
        if self.bias_factor is not None:
            added = added + self.bias_factor * old
        if self.new_bias is not None:
            added = added + mx.where(mx.isnan(self.new_bias), 0.0, self.new_bias - old)
        return replace(self, bias=added, bias_factor=None, new_bias=None)


def row_norms(weight: mx.array) -> mx.array:
    """(out, in) -> (out,) in float32."""
    return mx.linalg.norm(weight.astype(mx.float32), axis=1)


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
