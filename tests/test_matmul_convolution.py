"""Convolutions as products against MLX's own: values and both gradients."""

import copy

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from flux.models.autoencoder import AutoEncoder, AutoEncoderParams
from flux.models.florence2.depthwise import DepthwiseConv2d
from flux.training.matmul_convolution import PatchConv2d, use_products


def error(ours: mx.array, reference: mx.array) -> float:
    return (mx.linalg.norm((ours - reference).flatten()) / mx.linalg.norm(reference.flatten())).item()


def pair(inputs: int, outputs: int, **kind: int) -> tuple[nn.Conv2d, nn.Conv2d]:
    """MLX's own convolution and the product with the same weights."""
    reference, ours = nn.Conv2d(inputs, outputs, **kind), nn.Conv2d(inputs, outputs, **kind)
    reference.bias = mx.random.normal((outputs,))
    ours.update(reference.parameters())
    use_products(ours)
    return reference, ours


@pytest.mark.parametrize(("inputs", "outputs"), [(3, 8), (8, 8), (8, 16), (16, 3), (16, 16), (5, 48)])
@pytest.mark.parametrize("size", [(8, 8), (12, 16), (6, 10), (7, 9), (4, 15), (3, 3)])
@pytest.mark.parametrize(
    "kind",
    [{"kernel_size": 3, "padding": 1}, {"kernel_size": 3, "stride": 2}, {"kernel_size": 1}],
    ids=["stride1", "stride2", "1x1"],
)
def test_value_and_gradients(inputs, outputs, size, kind):
    mx.random.seed(0)
    reference, ours = pair(inputs, outputs, **kind)
    assert type(ours) is not nn.Conv2d
    x = mx.random.normal((2, *size, inputs))
    dy = mx.random.normal(reference(x).shape)

    def loss(layer: nn.Conv2d, x: mx.array) -> mx.array:
        return (layer(x) * dy).sum()

    assert error(ours(x), reference(x)) <= 1e-6
    assert error(mx.grad(lambda x: loss(ours, x))(x), mx.grad(lambda x: loss(reference, x))(x)) <= 1e-6
    gradients = [nn.value_and_grad(layer, loss)(layer, x)[1] for layer in (ours, reference)]
    for name in ("weight", "bias"):
        assert error(gradients[0][name], gradients[1][name]) <= 2e-6


@pytest.mark.parametrize("size", [(8, 8), (12, 4), (1, 1), (2, 3)])
def test_depthwise(size):
    ours = DepthwiseConv2d(6)
    reference = nn.Conv2d(6, 6, 3, padding=1, groups=6)
    reference.update(ours.parameters())
    check(ours, reference, (2, *size, 6))


@pytest.mark.parametrize(("side", "size"), [(2, (4, 6)), (4, (8, 8)), (3, (3, 9))])
def test_patches_that_touch(side, size):
    reference = nn.Conv2d(5, 7, side, stride=side)
    ours = copy.deepcopy(reference)
    use_products(ours)
    assert type(ours) is PatchConv2d
    check(ours, reference, (2, *size, 5))


def check(ours: nn.Conv2d, reference: nn.Conv2d, shape: tuple[int, ...]) -> None:
    """The product against MLX's convolution: values and all gradients."""
    mx.random.seed(0)
    for layer in (ours, reference):
        layer.bias = mx.arange(len(layer.weight)) / 3
    x = mx.random.normal(shape)
    dy = mx.random.normal(reference(x).shape)

    def gradients(layer: nn.Conv2d) -> list[mx.array]:
        def loss(x: mx.array, weights: dict) -> mx.array:
            layer.update(weights)
            return (layer(x) * dy).sum()

        dx, weights = mx.grad(loss, (0, 1))(x, layer.parameters())
        return [dx, weights["weight"], weights["bias"]]

    assert error(ours(x), reference(x)) <= 1e-6
    for own, theirs in zip(gradients(ours), gradients(reference), strict=True):
        assert error(own, theirs) <= 2e-6


def test_a_whole_autoencoder_computes_the_same():
    mx.random.seed(0)
    params = AutoEncoderParams(ch=8, ch_mult=(1, 2, 4), num_res_blocks=1, z_channels=4, norm_groups=2)
    model = AutoEncoder(params)
    x = mx.random.normal((2, 24, 32, 3))
    before = model.decode(model.encode(x))
    mx.eval(before)
    names = set(dict(nn.utils.tree_flatten(model.parameters())))
    use_products(model)
    assert set(dict(nn.utils.tree_flatten(model.parameters()))) == names
    assert error(model.decode(model.encode(x)), before) <= 1e-5


def test_other_convolutions_are_left():
    layers = [nn.Conv2d(2, 2, 5), nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3, padding=1, stride=2)]
    layers += [nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.Conv2d(4, 4, 3, groups=4)]
    for layer in layers:
        use_products(layer)
        assert type(layer) is nn.Conv2d
    assert np.isfinite(np.array(layers[0](mx.ones((1, 5, 5, 2))))).all()
