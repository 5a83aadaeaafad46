"""The losses of the trainings and their gradients, against PyTorch's automatic differentiation."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from flux.training import losses
from flux.training.pretrain.adversary import Discriminator, DiscriminatorParams, hinge, r1

from ..tiny import randomize

torch = pytest.importorskip("torch")
F = torch.nn.functional


def relative(ours: mx.array, theirs: "torch.Tensor") -> float:
    a, b = np.array(ours, np.float64), theirs.detach().double().numpy()
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def to_torch(array: mx.array) -> "torch.Tensor":
    return torch.tensor(np.array(array), requires_grad=True)


@pytest.mark.parametrize("free_bits", [0.0, 0.05])
def test_kl(free_bits):
    mean, logvar = mx.random.normal((2, 3, 3, 4), key=mx.random.key(0)), mx.random.normal((2, 3, 3, 4)) * 0.3
    value, gradients = mx.value_and_grad(lambda m, v: losses.kl(m, v, free_bits), (0, 1))(mean, logvar)
    m, v = to_torch(mean), to_torch(logvar)
    expected = (-0.5 * (1 + v - m**2 - v.exp())).clamp(min=free_bits).mean()
    expected.backward()
    assert relative(value, expected) < 1e-6
    assert relative(gradients[0], m.grad) < 1e-6
    assert relative(gradients[1], v.grad) < 1e-6


@pytest.mark.parametrize("delta", [0.1, 2.0])
@pytest.mark.parametrize("name", losses.LOSSES)
def test_errors_of_fine_tuning(name, delta):
    """The formulas of sd-scripts (library/train_util.py, conditional_loss), in float64."""
    x, y = (mx.random.normal((3, 4, 5), key=mx.random.key(i)) for i in (3, 4))
    a, b = to_torch(x), to_torch(y)
    error, c = a.double() - b.double(), delta
    expected = {
        "mse": error**2,
        "l1": error.abs(),
        "huber": 2 * c * ((error**2 + c**2).sqrt() - c),
        "smooth_l1": 2 * ((error**2 + c**2).sqrt() - c),
    }[name]
    assert relative(losses.error(name, x, y, delta), expected) < 1e-6
    gradient = mx.grad(lambda x: losses.error(name, x, y, delta).sum())(x)
    expected.sum().backward()
    assert relative(gradient, a.grad) < 1e-6


def test_hinge():
    real, fake = mx.random.normal((2, 4, 4, 1), key=mx.random.key(1)), mx.random.normal((2, 4, 4, 1)) * 2
    value, gradients = mx.value_and_grad(hinge, (0, 1))(real, fake)
    a, b = to_torch(real), to_torch(fake)
    expected = F.relu(1 - a).mean() + F.relu(1 + b).mean()
    expected.backward()
    assert relative(value, expected) < 1e-6
    assert relative(gradients[0], a.grad) < 1e-6
    assert relative(gradients[1], b.grad) < 1e-6


class Torch(torch.nn.Module):
    """The discriminator with the same weights, channels first."""

    def __init__(self, ours: Discriminator, params: DiscriminatorParams):
        super().__init__()
        self.convs = torch.nn.ModuleList(self.convolution(conv, 2) for conv in ours.convs)
        self.out = self.convolution(ours.out, 1)
        self.norms = torch.nn.ModuleList()
        for norm in ours.norms:
            theirs = torch.nn.GroupNorm(params.norm_groups, norm.weight.size, eps=1e-6)
            theirs.weight.data, theirs.bias.data = to_torch(norm.weight), to_torch(norm.bias)
            self.norms.append(theirs)

    @staticmethod
    def convolution(ours: nn.Conv2d, stride: int) -> "torch.nn.Conv2d":
        o, k, _, i = ours.weight.shape
        theirs = torch.nn.Conv2d(i, o, k, stride, 1)
        theirs.weight.data = to_torch(ours.weight.transpose(0, 3, 1, 2))
        theirs.bias.data = to_torch(ours.bias)
        return theirs

    def forward(self, x: "torch.Tensor") -> "torch.Tensor":
        h = F.leaky_relu(self.convs[0](x), 0.2)
        for conv, norm in zip(self.convs[1:], self.norms, strict=True):
            h = F.leaky_relu(norm(conv(h)), 0.2)
        return self.out(h)


@pytest.mark.parametrize("size", [(16, 16), (18, 13)])
def test_discriminator_and_r1_with_second_derivatives(size):
    params = DiscriminatorParams(channels=6, layers=3, norm_groups=3)
    ours = randomize(Discriminator(params), 5)
    theirs = Torch(ours, params)
    x = mx.random.normal((2, *size, 3), key=mx.random.key(2))
    y = to_torch(x.transpose(0, 3, 1, 2))
    assert relative(ours(x).transpose(0, 3, 1, 2), theirs(y)) < 1e-5

    value, gradients = nn.value_and_grad(ours, lambda x: r1(ours, x))(x)
    (gradient,) = torch.autograd.grad(theirs(y).sum(), y, create_graph=True)
    expected = gradient.square().sum((1, 2, 3)).mean()
    assert relative(value, expected) < 1e-5
    expected.backward()
    for i, conv in enumerate(theirs.convs):
        found = gradients["convs"][i]["weight"].transpose(0, 3, 1, 2)
        assert relative(found, conv.weight.grad) < 1e-4, i
    for i, norm in enumerate(theirs.norms):
        assert relative(gradients["norms"][i]["weight"], norm.weight.grad) < 1e-4, i
    assert relative(gradients["out"]["weight"].transpose(0, 3, 1, 2), theirs.out.weight.grad) < 1e-4
