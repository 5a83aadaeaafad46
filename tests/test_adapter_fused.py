"""Fused layers <-> their parts."""

import mlx.core as mx
import numpy as np
import pytest

from flux.adapters.changes import Delta, Dense, Kronecker, LowRank
from flux.adapters.fused import Piece, fuse, split, swap_halves

from .adapter_files import HIDDEN, MLP, close, normal, pair

QKV = [HIDDEN, 2 * HIDDEN]
LINEAR1 = [HIDDEN, 2 * HIDDEN, 3 * HIDDEN]


def low_rank(rows: int, rank: int, alpha: float) -> LowRank:
    down, up = pair(rows, HIDDEN, rank)
    return LowRank(mx.array(down), mx.array(up), alpha)


def starts(deltas: list[Delta]) -> list[Piece]:
    return [Piece(HIDDEN * i, delta) for i, delta in enumerate(deltas)]


def test_rank_that_divides_says_nothing():
    """The known fault: an ordinary up of rank 12 (3 and 4 divide it) cut into diagonal blocks."""
    for cuts, rows in ((QKV, 3 * HIDDEN), (LINEAR1, 3 * HIDDEN + MLP)):
        change = low_rank(rows, 12, 5.0)
        parts = split(Delta(change), cuts)
        assert [part.change.rank for part in parts] == [12] * (len(cuts) + 1)
        whole = np.concatenate([np.array(part.change.dense()) for part in parts])
        assert close(change.dense(), whole)


def test_one_entry_off_the_diagonal_is_enough():
    up = np.zeros((3 * HIDDEN, 6), np.float32)
    for i in range(3):
        up[HIDDEN * i : HIDDEN * (i + 1), 2 * i : 2 * i + 2] = normal(HIDDEN, 2)
    down = mx.array(normal(6, HIDDEN))
    assert [p.change.rank for p in split(Delta(LowRank(down, mx.array(up), 6)), QKV)] == [2, 2, 2]
    up[3 * HIDDEN - 1, 0] = 1e-20
    parts = split(Delta(LowRank(down, mx.array(up), 6)), QKV)
    assert [part.change.rank for part in parts] == [6, 6, 6]
    assert parts[2].change.up[-1, 0].item() > 0


def test_block_diagonal_comes_apart_and_together_to_the_bit():
    parts = [Delta(low_rank(HIDDEN, 2, 2.0)) for _ in range(3)]
    whole = fuse(starts(parts), 3 * HIDDEN)
    assert whole.change.rank == whole.change.alpha == 6
    for part, back in zip(parts, split(whole, QKV), strict=True):
        assert back.change.alpha == back.change.rank == 2
        assert mx.array_equal(part.change.down, back.change.down)
        assert mx.array_equal(part.change.up, back.change.up)


def test_split_and_fused_again_is_the_same():
    whole = Delta(low_rank(3 * HIDDEN, 6, 4.0), mx.array(normal(3 * HIDDEN)), mx.array(normal(3 * HIDDEN)))
    back = fuse(starts(split(whole, QKV)), 3 * HIDDEN)
    assert back.change.alpha == 4.0
    for name in ("down", "up"):
        assert mx.array_equal(getattr(back.change, name), getattr(whole.change, name))
    assert mx.array_equal(back.bias, whole.bias)
    assert mx.array_equal(back.magnitude, whole.magnitude)


def test_unequal_ranks_alphas_and_gaps():
    q, mlp = low_rank(HIDDEN, 3, 1.0), low_rank(MLP, 5, 2.0)
    bias = mx.array(normal(HIDDEN))
    whole = fuse([Piece(3 * HIDDEN, Delta(mlp)), Piece(0, Delta(q, bias=bias))], 3 * HIDDEN + MLP)
    gap = np.zeros((2 * HIDDEN, HIDDEN), np.float32)
    assert close(whole.change.dense(), np.concatenate([q.dense(), gap, mlp.dense()]))
    assert whole.change.rank == whole.change.alpha == 8
    assert mx.array_equal(whole.bias[:HIDDEN], bias)
    assert not mx.any(whole.bias[HIDDEN:]).item()


@pytest.mark.parametrize("other", ["dense", "kronecker"])
def test_mixed_kinds_stay_what_they_are(other: str):
    q = low_rank(HIDDEN, 3, 1.0)
    weight = mx.array(normal(HIDDEN, HIDDEN))
    kinds = {"dense": Dense(weight), "kronecker": Kronecker(weight[:2, :2], weight[4:8, 4:8], 0.5)}
    whole = fuse(starts([Delta(q), Delta(kinds[other])]), 3 * HIDDEN)
    assert close(whole.change.dense()[: 2 * HIDDEN], np.concatenate([q.dense(), kinds[other].dense()]))
    again = split(whole, QKV)
    assert again[0].change is q
    assert again[1].change is kinds[other]
    assert again[2].change is None


def test_pieces_that_do_not_fit():
    q = Delta(low_rank(2 * HIDDEN, 3, 1.0))
    for pieces in ([Piece(0, q), Piece(HIDDEN, q)], [Piece(2 * HIDDEN, q)]):
        with pytest.raises(ValueError, match="do not fit"):
            fuse(pieces, 3 * HIDDEN)


def test_swapped_halves():
    weight, vector = normal(6, HIDDEN), normal(6)
    swapped = [3, 4, 5, 0, 1, 2]
    change = low_rank(6, 4, 3.0)
    delta = swap_halves(Delta(change, mx.array(vector), mx.array(vector)))
    assert close(delta.change.dense(), np.array(change.dense())[swapped])
    assert mx.array_equal(delta.change.down, change.down)
    assert close(delta.bias, vector[swapped])
    assert close(delta.magnitude, vector[swapped])
    assert close(swap_halves(Delta(Dense(mx.array(weight)))).change.dense(), weight[swapped])
