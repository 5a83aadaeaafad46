"""Normalized attention guidance: lengths, ranks, bounds. The formula: tests/parity/test_nag.py."""

import mlx.core as mx
import pytest

from flux.errors import FluxError
from flux.models.layers import attention, rotary_tables
from flux.models.nag import Nag, NagAttention, normalized

HEADS, DIM = 3, 8
NAG = Nag(5)


def heads(length: int, seed: int) -> mx.array:
    return mx.random.normal((2, HEADS, length, DIM), key=mx.random.key(seed))


def same(norms: mx.array) -> mx.array:
    return norms


def tables(length: int) -> mx.array:
    ids = mx.arange(length)[None, :, None]
    return rotary_tables(ids, (DIM,), 100)


def test_texts_of_different_lengths_do_not_see_each_other():
    """Each text's tokens are those of an attention without the other."""
    positive, negative, picture = 4, 7, 5
    length = positive + negative + picture
    q, k, v = (heads(length, seed) for seed in range(3))
    pe = tables(length)
    z = NagAttention(NAG, (positive, negative), same)(q, k, v, pe)
    assert z.shape == (2, length, HEADS * DIM)
    rest = list(range(positive + negative, length))
    for first, kept in ((0, [*range(positive), *rest]), (positive, [*range(positive, length)])):
        alone = attention(*(x[..., mx.array(kept), :] for x in (q, k, v, pe)))
        count = len(kept) - picture
        assert mx.abs(z[:, first : first + count] - alone[:, :count]).max() < 1e-6


def test_the_same_text_twice_has_no_effect():
    text, picture = 4, 5
    q, k, v = (heads(text + picture, seed) for seed in range(3))
    pe = tables(text + picture)
    plain = attention(q, k, v, pe)
    twice = mx.array([*range(text), *range(text + picture)])
    z = NagAttention(NAG, (text, text), same)(*(x[..., twice, :] for x in (q, k, v, pe)))
    assert mx.abs(z[:, text:] - plain).max() < 1e-5


def test_norms_are_those_of_all_ranks_heads():
    """A rank has some of the heads: with the others' norms added it gives its part of the whole's result."""
    p, n = (mx.random.normal((1, 6, 12), key=mx.random.key(seed)) for seed in range(2))
    whole = normalized(p, n, Nag(9, tau=1.5), same)
    parts: list[mx.array] = []
    norms: list[mx.array] = []
    halves = [(x[..., :4], y[..., :4]) for x, y in [(p, n)]] + [(x[..., 4:], y[..., 4:]) for x, y in [(p, n)]]
    for half in halves:
        normalized(*half, Nag(9, tau=1.5), lambda own: norms.append(own) or own)
    for half in halves:
        parts.append(normalized(*half, Nag(9, tau=1.5), lambda own: norms[0] + norms[1]))
    assert mx.abs(mx.concatenate(parts, axis=-1) - whole).max() < 1e-6
    alone = normalized(*halves[0], Nag(9, tau=1.5), lambda own: own)
    assert mx.abs(alone - whole[..., :4]).max() > 1e-3


def test_norms_stay_below_tau_times_the_positive_and_are_finite():
    p, n = (mx.random.normal((1, 6, 12), key=mx.random.key(seed)) for seed in range(2))
    z = normalized(p, 100 * n, Nag(5, tau=2, alpha=1), same)
    assert mx.allclose(mx.abs(z).sum(-1), 2 * mx.abs(p).sum(-1))
    zero = mx.zeros((1, 2, 12))
    assert mx.array_equal(normalized(zero, zero, NAG, same), zero)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((1,), "the NAG scale must be above 1 .*, not 1"),
        ((float("nan"),), "the NAG scale must be above 1 .*, not nan"),
        ((float("inf"),), "the NAG scale must be above 1 .*, not inf"),
        ((5, 0), "NAG's tau must be above 0 and finite, not 0"),
        ((5, 2.5, 1.5), "NAG's alpha must be above 0 and at most 1, not 1.5"),
    ],
)
def test_bad_values_are_named(values: tuple[float, ...], said: str):
    with pytest.raises(FluxError, match=said):
        Nag(*values)
