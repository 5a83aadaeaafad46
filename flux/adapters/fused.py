"""Changes of a fused layer <-> changes of the layers that it was made of (qkv <-> to_q, to_k, to_v).

A fused layer's rows are its parts' rows one under another. A part may cover several neighbours (XLabs changes
q, k and v of `linear1` as one), may be missing (it changes nothing), and has a rank of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from flux.adapters.adapter import Change, Delta, Dense, LowRank, folded

NAN = float("nan")  # in a magnitude: this row is no DoRA


@dataclass(frozen=True)
class Piece:
    """A change of the rows from `start` on."""

    start: int
    delta: Delta


def fuse(pieces: Sequence[Piece], rows: int) -> Delta:
    """The change of the whole layer of `rows` rows. Raises ValueError where pieces overlap or stick out."""
    end = 0
    for piece in sorted(pieces, key=lambda piece: piece.start):
        if piece.start < end or piece.start + (piece.delta.shape[0] or 0) > rows:
            raise ValueError("the parts of a fused layer do not fit together")
        end = piece.start + (piece.delta.shape[0] or 0)
    changes = [(piece.start, piece.delta.change) for piece in pieces if piece.delta.change is not None]
    vectors = [
        _fuse_vectors([(p.start, v) for p in pieces if (v := getattr(p.delta, name)) is not None], rows, gap)
        for name, gap in (("bias", 0.0), ("magnitude", NAN))
    ]
    return Delta(_fuse_changes(changes, rows) if changes else None, *vectors)


def _fuse_changes(changes: list[tuple[int, Change]], rows: int) -> Change:
    if not all(isinstance(change, LowRank) for _, change in changes):
        return Dense(sum(_pad(change.dense(), start, rows) for start, change in changes))
    first = changes[0][1]
    if all(_same_down(first, change) for _, change in changes):
        return LowRank(first.down, sum(_pad(c.up, start, rows) for start, c in changes), first.alpha)
    own = [(start, folded(change)) for start, change in changes]
    down = mx.concatenate([change.down for _, change in own])  # (sum of r, in)
    up = mx.concatenate([_pad(change.up, start, rows) for start, change in own], axis=1)  # (rows, sum of r)
    return LowRank(down, up, down.shape[0])


def _same_down(a: LowRank, b: LowRank) -> bool:
    """Whether two parts share their down, as after a split: one copy then serves the fused layer."""
    return a.alpha == b.alpha and a.down.shape == b.down.shape and mx.array_equal(a.down, b.down).item()


def _pad(block: mx.array, start: int, rows: int) -> mx.array:
    """(n, ...) -> (rows, ...) with the block at `start` and zeros around it."""
    return mx.pad(block, [(start, rows - start - block.shape[0])] + [(0, 0)] * (block.ndim - 1))


def _fuse_vectors(vectors: list[tuple[int, mx.array]], rows: int, gap: float) -> mx.array | None:
    if not vectors:
        return None
    out = mx.full((rows,), gap, dtype=mx.float32)
    for start, vector in vectors:
        out[start : start + vector.shape[0]] = vector.astype(mx.float32)
    return out


def split(delta: Delta, cuts: Sequence[int]) -> list[Delta]:
    """The changes of the parts; cuts: the rows where a new part begins, without the first."""
    changes: list[Change | None] = [None] * (len(cuts) + 1)
    if isinstance(delta.change, LowRank):
        changes = _split_low_rank(delta.change, cuts)
    elif delta.change is not None:
        changes = [Dense(rows) for rows in mx.split(delta.change.dense(), list(cuts))]
    vectors = [
        [None] * len(changes) if vector is None else mx.split(vector, list(cuts))
        for vector in (delta.bias, delta.magnitude)
    ]
    return [Delta(*part) for part in zip(changes, *vectors, strict=True)]


def _split_low_rank(change: LowRank, cuts: Sequence[int]) -> list[LowRank]:
    """A block-diagonal up gives each part its own block; any other gives every part the whole down.

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
    """The rows' second half before the first: in `up` alone, the columns of dW (`down`) stay."""

    def swap(tensor: mx.array | None) -> mx.array | None:
        return None if tensor is None else mx.concatenate(mx.split(tensor, 2)[::-1])

    change = delta.change
    if isinstance(change, LowRank):
        change = LowRank(change.down, swap(change.up), change.alpha)
    elif change is not None:
        change = Dense(swap(change.dense()))
    return Delta(change, swap(delta.bias), swap(delta.magnitude))
