"""Changes of a fused layer <-> changes of the layers that it was made of (qkv <-> to_q, to_k, to_v).

A fused layer's rows are its parts' rows one under another. A part may cover several neighbours (XLabs changes
q, k and v of `linear1` as one), may be missing (it changes nothing), and may have another rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

import mlx.core as mx

from flux.adapters.changes import (
    LYCORIS,
    Additive,
    Change,
    Delta,
    Dense,
    GLoRA,
    Hadamard,
    LowRank,
    Replacement,
    Rotation,
    Scaling,
    Stack,
    folded,
)
from flux.errors import FluxError
from flux.weights.keymaps import swap_halves as swapped

NAN = float("nan")  # in a magnitude: this row is not of a DoRA; in a new bias: this one stays
Data = TypeVar("Data", bound="Delta | Change")
GAPS = {
    "bias": 0.0,
    "bias_factor": 0.0,
    "new_bias": NAN,
    "magnitude": NAN,
}  # a vector, and what fills its gaps


@dataclass(frozen=True)
class Piece:
    """A change of the rows from `start` on; rows: how many, where the change does not tell."""

    start: int
    delta: Delta
    rows: int | None = None

    @property
    def end(self) -> int:
        """The row after the last."""
        return self.start + (self.delta.shape[0] or self.rows or 0)


def fuse(pieces: Sequence[Piece], rows: int) -> Delta:
    """The change of the whole layer of `rows` rows. Raises ValueError where pieces overlap or stick out.

    Parts of low rank, with DoRA along the rows or without, make one change of low rank; any others a Stack.
    """
    pieces = sorted(pieces, key=lambda piece: piece.start)
    for piece, after in zip(pieces, [*(p.start for p in pieces[1:]), rows], strict=True):
        if piece.end > after or piece.rows not in (None, piece.end - piece.start):
            raise ValueError("the parts of a fused layer do not fit together")
    changes = [piece for piece in pieces if piece.delta.change is not None]
    vectors: dict[str, Any] = {
        name: _fuse_vectors(pieces, name, rows) for name in GAPS if name != "magnitude"
    }
    rule = next((piece.delta.rule for piece in changes if piece.delta.magnitude is not None), Delta().rule)
    if not changes:
        return Delta(**vectors)
    low_rank = [(p.start, p.delta.change) for p in changes if isinstance(p.delta.change, LowRank)]
    if len(low_rank) < len(changes) or not _agree(changes):
        parts = tuple(
            (p.start, p.end, Delta(p.delta.change, magnitude=p.delta.magnitude, rule=p.delta.rule))
            for p in changes
        )
        return Delta(Stack(parts, rows), **vectors)
    magnitude = _fuse_vectors(pieces, "magnitude", rows)
    return Delta(_fuse_low_rank(low_rank, rows), magnitude=magnitude, rule=rule, **vectors)


def _agree(pieces: Sequence[Piece]) -> bool:
    """Whether one DoRA along the rows, or none, serves all parts. By LyCORIS' rule each must then be one."""
    scaled = [piece.delta for piece in pieces if piece.delta.magnitude is not None]
    rules = {delta.rule for delta in scaled}
    mixed = len(scaled) < len(pieces) and LYCORIS in rules
    return len(rules) < 2 and not mixed and not any(delta.is_of_columns for delta in scaled)


def _fuse_low_rank(changes: Sequence[tuple[int, LowRank]], rows: int) -> LowRank:
    first = changes[0][1]
    if all(_same_down(first, change) for _, change in changes):
        ups = [_pad(change.up, start, rows) for start, change in changes]
        return LowRank(first.down, sum(ups[1:], ups[0]), first.alpha)
    scaled = [(start, folded(change)) for start, change in changes]
    down = mx.concatenate([change.down for _, change in scaled])  # (sum of r, in)
    up = mx.concatenate(
        [_pad(change.up, start, rows) for start, change in scaled], axis=1
    )  # (rows, sum of r)
    return LowRank(down, up, down.shape[0])


def _same_down(a: LowRank, b: LowRank) -> bool:
    """Whether two parts share their down, as after a split: one copy then serves the fused layer."""
    return a.alpha == b.alpha and a.down.shape == b.down.shape and bool(mx.array_equal(a.down, b.down).item())


def _pad(block: mx.array, start: int, rows: int) -> mx.array:
    """(n, ...) -> (rows, ...) with the block at `start` and zeros around it."""
    return mx.pad(block, [(start, rows - start - block.shape[0])] + [(0, 0)] * (block.ndim - 1))


def _fuse_vectors(pieces: Sequence[Piece], name: str, rows: int) -> mx.array | None:
    vectors = [(p.start, v) for p in pieces if (v := getattr(p.delta, name)) is not None]
    if not vectors:
        return None
    out = mx.full((rows,), GAPS[name], dtype=mx.float32)
    for start, vector in vectors:
        out[start : start + vector.shape[0]] = vector.astype(mx.float32)
    return out


def split(delta: Delta, cuts: Sequence[int]) -> list[Delta]:
    """The changes of the parts; cuts: the rows where a new part begins, without the first.

    FluxError for a change that cannot be cut there: one that needs the whole weight.
    """
    parts = _split_change(delta, cuts)
    for name in GAPS:
        vector = getattr(delta, name)
        if vector is not None and vector.ndim == 1:
            vectors = mx.split(vector, list(cuts))
            parts = [_with(part, {name: vector}) for part, vector in zip(parts, vectors, strict=True)]
        elif vector is not None:  # a DoRA's columns, whose norms are those of the whole layer
            raise FluxError("a DoRA along the columns of a fused layer cannot be split into its parts")
    return [replace(part, rule=delta.rule) if delta.magnitude is not None else part for part in parts]


def _split_change(delta: Delta, cuts: Sequence[int]) -> list[Delta]:
    change = delta.change
    if change is None:
        return [Delta() for _ in range(len(cuts) + 1)]
    if isinstance(change, LowRank):
        return [Delta(part) for part in _split_low_rank(change, cuts)]
    if isinstance(change, Stack):
        edges = [0, *cuts, change.rows]
        by_edges = {(start, end): part for start, end, part in change.parts}
        if all(start in edges and edges[edges.index(start) + 1] == end for start, end in by_edges):
            return [by_edges.get(edge, Delta()) for edge in pairwise(edges)]
    if isinstance(change, Additive):
        return [Delta(Dense(rows)) for rows in mx.split(change.dense(), list(cuts))]
    raise FluxError(f"a change of the kind {type(change).__name__} cannot be split")


def _split_low_rank(change: LowRank, cuts: Sequence[int]) -> list[LowRank]:
    """A block-diagonal up gives each part one block; any other gives every part the whole down.

    That the rank divides by the parts says nothing: an ordinary file of rank 48 does that too. Only the zeros
    tell.
    """
    parts = len(cuts) + 1
    ups = mx.split(change.up, list(cuts))
    if change.rank % parts == 0:
        blocks = [mx.split(up, parts, axis=1) for up in ups]  # blocks[i][j]: rows of part i, columns of j
        others = [blocks[i][j] for i in range(parts) for j in range(parts) if i != j]
        if not any(mx.any(block != 0).item() for block in others):
            downs = mx.split(change.down, parts)
            return [LowRank(downs[i], blocks[i][i], change.alpha / parts) for i in range(parts)]
    return [LowRank(change.down, up, change.alpha) for up in ups]


def swap_halves(delta: Delta) -> Delta:
    """The rows' second half before the first: in `up` alone, the columns of dW (`down`) stay.

    FluxError for a rotation of the rows whose blocks do not swap with them.
    """
    magnitude = delta.magnitude
    vectors = {name: swapped(value) for name in GAPS if (value := getattr(delta, name)) is not None}
    if magnitude is not None and magnitude.ndim == 2:
        vectors["magnitude"] = magnitude
    return _with(replace(delta, change=_swap_change(delta.change)), vectors)


def _with(data: Data, values: Mapping[str, Any]) -> Data:
    """The same with other values of some fields."""
    return replace(data, **values)


# The fields of each kind that have the weight's rows.
ROWS: dict[type, tuple[str, ...]] = {
    LowRank: ("up",),
    Hadamard: ("a1", "a2"),
    Dense: ("weight",),
    GLoRA: ("b1",),
    Replacement: ("weight",),
}


def _swap_change(change: Change | None) -> Change | None:
    if change is None:
        return None
    if isinstance(change, Scaling):
        return change if change.shape[0] is None else Scaling(swapped(change.factor))
    if isinstance(change, Rotation):
        return _swap_rotation(change)
    if type(change) in ROWS:
        return _with(change, {name: swapped(getattr(change, name)) for name in ROWS[type(change)]})
    if isinstance(change, Additive):
        return Dense(swapped(change.dense()))
    raise FluxError(f"a change of the kind {type(change).__name__} cannot be read for norm_out")


def _swap_rotation(change: Rotation) -> Rotation:
    if change.rescale is not None:
        change = replace(change, rescale=swapped(change.rescale))
    if change.inner:
        return change
    if change.butterfly or change.blocks.shape[1] % 2:
        raise FluxError("a rotation of norm_out's rows mixes its two halves: it cannot be read here")
    return replace(change, blocks=swapped(change.blocks.swapaxes(0, 1)).swapaxes(0, 1))
