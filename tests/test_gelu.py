"""The captioner's GELU against the exact one."""

import math

import mlx.core as mx
import numpy as np
from mlx import nn

from flux.models.florence2.gelu import gelu


def test_it_is_exact_everywhere():
    x = np.concatenate([np.linspace(-8, 8, 4001), [-1e4, -30, 30, 1e4]]).astype(np.float32)
    exact = np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x.tolist()])
    assert np.all(np.abs(np.array(gelu(mx.array(x))) - exact) <= 1e-6 + 2.4e-7 * np.abs(x))


def test_its_gradient():
    x = mx.linspace(-6, 6, 2001)
    ours, exact = (mx.grad(lambda x, f=f: f(x).sum())(x) for f in (gelu, nn.gelu))
    assert mx.abs(ours - exact).max() <= 1e-5
