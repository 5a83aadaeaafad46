"""Products of matrices that compute nothing: results of the right shape, made of what the true ones are.

What a step allocates, and for how long, does not depend on the numbers. With these, and with weights that
take no memory, a step of FLUX.1-dev can be measured on a processor that would need hours for its products.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map


@mx.custom_function
def _product(a: mx.array, b: mx.array) -> mx.array:
    return a[..., :1] + b[..., :1, :]


def product(a: mx.array, b: mx.array) -> mx.array:
    """(..., M, K) and (..., K, N) -> (..., M, N)."""
    out = _product(a, b)
    assert isinstance(out, mx.array)  # MLX's types call it an object
    return out


@_product.vjp
def _product_vjp(inputs: tuple[mx.array, mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, ...]:
    a, b = inputs
    return product(cotangent, b.swapaxes(-1, -2)), product(a.swapaxes(-1, -2), cotangent)


@mx.custom_function
def _quantized(x: mx.array, rows: mx.array) -> mx.array:
    return x[..., :1] + rows


def quantized(x: mx.array, rows: mx.array) -> mx.array:
    """(..., in) and (out,) -> (..., out)."""
    out = _quantized(x, rows)
    assert isinstance(out, mx.array)  # MLX's types call it an object
    return out


@_quantized.vjp
def _quantized_vjp(
    inputs: tuple[mx.array, mx.array], cotangent: mx.array, _: mx.array
) -> tuple[mx.array, ...]:
    x, rows = inputs
    return quantized(cotangent, mx.zeros(x.shape[-1:], x.dtype)), mx.zeros_like(rows)


def matmul(a: mx.array, b: mx.array) -> mx.array:
    if a.ndim > 2 and b.ndim == 2:  # as MLX does it: then the gradient of b is one product too
        return product(a.flatten(0, -2), b).reshape(*a.shape[:-1], -1)
    return product(a, b)


def addmm(c: mx.array, a: mx.array, b: mx.array) -> mx.array:
    return c + matmul(a, b)


def quantized_matmul(x: mx.array, weight: mx.array, scales: mx.array, **_: object) -> mx.array:
    return quantized(x, scales[:, 0].astype(x.dtype))


def attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float) -> mx.array:
    """What MLX makes of attention where it has no fused kernel, as in training everywhere but on CUDA."""
    scores = product(mx.array(scale, q.dtype) * q, k.swapaxes(-1, -2))  # (B, H, L, L)
    return product(mx.softmax(scores, axis=-1, precise=True), v)


@contextmanager
def products_stand_in() -> Iterator[None]:
    """Inside, MLX's products are those of this file."""
    with (
        mock.patch.object(mx, "matmul", matmul),
        mock.patch.object(mx.array, "__matmul__", matmul),
        mock.patch.object(mx, "addmm", addmm),
        mock.patch.object(mx, "quantized_matmul", quantized_matmul),
        mock.patch.object(mx.fast, "scaled_dot_product_attention", attention),
    ):
        yield


def weights_of_nothing(network: nn.Module) -> None:
    """Replaces every parameter by one zero that is seen everywhere: right shapes in a few bytes."""
    network.update(tree_map(lambda w: mx.broadcast_to(mx.zeros(1, w.dtype), w.shape), network.parameters()))
