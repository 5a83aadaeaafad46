"""LPIPS against the authors' package, with the same weights, and PyTorch's files read without PyTorch.

torchvision is not needed: the package takes VGG16 from it, so a stand-in of the same layers takes its place.
The weights are random. Trained ones would only make a narrower test, and are not part of this repository.
"""

import importlib
import sys
import types
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flux.errors import FluxError
from flux.training.pretrain import lpips as ours
from flux.weights import torchfile

torch = pytest.importorskip("torch")


def vgg_features() -> "torch.nn.Sequential":
    """torchvision's vgg16().features: 31 layers, the convolutions where `ours.VGG16` says."""
    layers, channels = [], 3
    for level in ours.VGG16:
        for number, width in level:
            assert number == len(layers)
            layers += [torch.nn.Conv2d(channels, width, 3, padding=1), torch.nn.ReLU(inplace=True)]
            channels = width
        layers.append(torch.nn.MaxPool2d(2, 2))
    return torch.nn.Sequential(*layers)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> tuple[dict, dict, Path]:
    """State dicts as torchvision and the package name them, and the folder where they are files."""
    torch.manual_seed(0)
    features = vgg_features()
    for layer in features:
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)
            torch.nn.init.normal_(layer.bias, std=0.1)
    vgg = {f"features.{name}": w for name, w in features.state_dict().items()}
    widths = [level[-1][1] for level in ours.VGG16]
    linear = {f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1) for i, width in enumerate(widths)}
    folder = tmp_path_factory.mktemp("lpips")
    torch.save(vgg, folder / "vgg16.pth")
    torch.save(linear, folder / "linear.pth", _use_new_zipfile_serialization=False)
    return vgg, linear, folder


@pytest.fixture(scope="module")
def model(weights) -> ours.LPIPS:
    return ours.load(str(weights[2] / "vgg16.pth"), str(weights[2] / "linear.pth"))


@pytest.fixture(scope="module")
def reference(weights, stand_ins):
    """(x, y) -> distances: the package's network, or on a machine without it the paper's formula."""
    vgg, linear, _ = weights
    try:
        package = importlib.import_module("lpips")  # pip install --no-deps lpips
    except ImportError:
        return lambda x, y: by_hand(vgg, linear, x, y)
    net = package.LPIPS(pretrained=False, net="vgg", pnet_rand=True, verbose=False)
    names = {name: name.removeprefix("features.") for name in vgg}
    slices = {f"slice{slice_of(int(n.split('.')[0]))}.{n}": vgg[name] for name, n in names.items()}
    net.net.load_state_dict(slices)
    rest = net.load_state_dict(linear, strict=False)
    assert not rest.unexpected_keys
    return net.eval()


def slice_of(number: int) -> int:
    return 1 + sum(number >= first for first in (4, 9, 16, 23))


def by_hand(vgg: dict, linear: dict, x: "torch.Tensor", y: "torch.Tensor") -> "torch.Tensor":
    """Equation 1 of the paper: unit features, squared differences, weighted and averaged over the picture."""
    features, total = vgg_features(), 0
    features.load_state_dict({name.removeprefix("features."): w for name, w in vgg.items()})
    shift, scale = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (ours.SHIFT, ours.SCALE))
    levels = []
    for h in (x, y):
        h, found = (h - shift) / scale, []
        for number, layer in enumerate(features):
            h = layer(h)
            if number - 1 in [level[-1][0] for level in ours.VGG16]:
                found.append(h / (h.norm(dim=1, keepdim=True) + 1e-10))
        levels.append(found)
    for i, (a, b) in enumerate(zip(*levels, strict=True)):
        total = total + ((a - b) ** 2 * linear[f"lin{i}.model.1.weight"]).sum(1).mean((1, 2))
    return total


@pytest.fixture(scope="module")
def stand_ins():
    """For what the package imports: torchvision's VGG16, and a function of scipy that it never calls."""
    torchvision, scipy = types.ModuleType("torchvision"), types.ModuleType("scipy")
    torchvision.models = types.ModuleType("torchvision.models")
    torchvision.models.vgg16 = lambda pretrained: types.SimpleNamespace(features=vgg_features())
    scipy.ndimage = types.ModuleType("scipy.ndimage")
    scipy.ndimage.zoom = None
    names = {"torchvision": torchvision, "torchvision.models": torchvision.models}
    names |= {"scipy": scipy, "scipy.ndimage": scipy.ndimage}
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update(names)
    yield
    for name, module in before.items():
        sys.modules.pop(name) if module is None else sys.modules.update({name: module})


def test_distance_and_gradient_are_the_packages(model, reference):
    x, y = (mx.random.uniform(-1, 1, (2, 37, 50, 3), key=mx.random.key(i)) for i in range(2))
    a, b = (torch.tensor(np.array(p)).permute(0, 3, 1, 2) for p in (x, y))
    a.requires_grad_()
    expected = reference(a, b).reshape(-1)
    expected.sum().backward()
    distance = model(x, y)
    np.testing.assert_allclose(np.array(distance), expected.detach().numpy(), rtol=1e-5)
    gradient = mx.grad(lambda x: model(x, y).sum())(x)
    theirs = a.grad.permute(0, 2, 3, 1).numpy()
    assert np.linalg.norm(np.array(gradient) - theirs) < 1e-4 * np.linalg.norm(theirs)


def test_the_same_picture_has_no_distance_and_a_finite_gradient(model):
    x = mx.zeros((1, 16, 16, 3))
    # Both go through the network as one batch, whose rows a BLAS may sum in different orders.
    assert model(x, x).item() < 1e-12
    assert mx.isfinite(mx.grad(lambda x: model(x, mx.zeros_like(x)).sum())(x)).all().item()


def test_pytorchs_files_are_read_without_it(weights, tmp_path):
    odd = {"a": torch.arange(12.0).reshape(3, 4).T, "b": torch.ones(2, dtype=torch.int64)}
    for name, legacy in (("new.pth", False), ("old.pth", True)):
        torch.save(odd, tmp_path / name, _use_new_zipfile_serialization=not legacy)
        found = torchfile.load([tmp_path / name])
        assert found.keys() == {"a", "b"}
        assert np.array_equal(found["a"], odd["a"].numpy())
        assert found["b"].dtype == mx.int64
    for name, state in zip(("vgg16.pth", "linear.pth"), weights[:2], strict=True):
        found = torchfile.load([weights[2] / name])
        assert all(np.array_equal(found[n], w.numpy()) for n, w in state.items())


def test_a_file_that_would_run_code_is_refused(tmp_path):
    path = tmp_path / "evil.pth"
    torch.save({"a": types.SimpleNamespace(x=1)}, path)
    with pytest.raises(FluxError, match=r"evil\.pth: not a PyTorch file.*SimpleNamespace"):
        torchfile.load([path])
    path.write_bytes(b"no pickle")
    with pytest.raises(FluxError, match="not a PyTorch file"):
        torchfile.load([path])


def test_files_that_do_not_fit_are_named(weights, tmp_path):
    folder = weights[2]
    with pytest.raises(FluxError, match=r"lack, or have in other shapes: features\.0\.weight"):
        ours.load(str(folder / "linear.pth"), str(folder / "linear.pth"))
    with pytest.raises(FluxError, match=r"no file .*absent\.pth"):
        ours.load(str(folder / "vgg16.pth"), str(tmp_path / "absent.pth"))
    with pytest.raises(FluxError, match="hf://owner/repository/file"):
        ours.load("hf://vgg", str(folder / "linear.pth"))
    with pytest.raises(FluxError, match="HF_HUB_OFFLINE"):
        ours.load("hf://timm/vgg16.tv_in1k/model.safetensors", str(folder / "linear.pth"))
