"""LPIPS: how different two pictures look, by the features of VGG16 and learned weights of their channels.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (2018), version 0.1 as
the authors' package `lpips` computes it. VGG16 is Simonyan & Zisserman's, under torchvision's names.
"""

import importlib.util
import os
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from flux.errors import FluxError
from flux.trees import named_arrays
from flux.weights import checkpoints, tensors, torchfile

# torchvision's `features`: the number of each convolution and its channels, a tuple a resolution. What is
# compared are the features after each tuple's last.
VGG16 = (
    ((0, 64), (2, 64)),
    ((5, 128), (7, 128)),
    ((10, 256), (12, 256), (14, 256)),
    ((17, 512), (19, 512), (21, 512)),
    ((24, 512), (26, 512), (28, 512)),
)
VGG16_FILE = "vgg16-397923af.pth"  # torchvision's
VGG16_ON_THE_HUB = "hf://timm/vgg16.tv_in1k/model.safetensors"
LEARNED = (  # packages, and the learned weights in them
    ("lpips", "weights", "v0.1", "vgg.pth"),
    ("torchmetrics", "functional", "image", "lpips_models", "vgg.pth"),
)
# What turns a picture in -1..1 into one that is normalised as ImageNet's were for VGG16.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


class LPIPS(nn.Module):
    """Distance of pictures. Its parameters are those of `load`; they are never trained."""

    def __init__(self) -> None:
        super().__init__()
        widths = [3, *(width for level in VGG16 for _, width in level)]
        self.convs = [nn.Conv2d(i, o, 3, padding=1) for i, o in pairwise(widths)]
        self.linear = [mx.zeros(level[-1][1]) for level in VGG16]
        self.freeze()

    def __call__(self, x: mx.array, y: mx.array) -> mx.array:
        """Distance (B,) of pictures (B, H, W, 3) in -1..1, H and W at least 16."""
        distance = mx.zeros(len(x))
        both = mx.concatenate([x, y]).astype(mx.float32)
        for weight, h in zip(self.linear, self._levels(both), strict=True):
            a, b = mx.split(_unit(h), 2)
            distance = distance + (mx.square(a - b) @ weight).mean(axis=(1, 2))
        return distance

    def _levels(self, x: mx.array) -> list[mx.array]:
        """VGG16's features at five resolutions, (B, H / 2^i, W / 2^i, C)."""
        h, levels, convs = (x - mx.array(SHIFT)) / mx.array(SCALE), [], iter(self.convs)
        for i, level in enumerate(VGG16):
            h = h if i == 0 else _half(h)
            for _ in level:
                h = mx.maximum(next(convs)(h), 0)
            levels.append(h)
        return levels


def _half(x: mx.array) -> mx.array:
    """Maximum of each 2x2 patch; a last odd row or column is dropped, as in torchvision."""
    b, h, w, c = x.shape
    x = x[:, : h // 2 * 2, : w // 2 * 2]
    return x.reshape(b, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))


def _unit(x: mx.array) -> mx.array:
    """Channels as a vector of length 1. Where all are 0 the root's derivative is infinite: it is bounded."""
    length = mx.sqrt(mx.maximum(mx.square(x).sum(axis=-1, keepdims=True), 1e-30))
    return x / (length + 1e-10)


def find(vgg: str | None = None, linear: str | None = None) -> tuple[str, str]:
    """The files of VGG16 and of the learned weights: those given, or where torchvision and lpips keep them.

    VGG16 comes from the Hub where it is in no cache. FluxError, with a way to get it, for a file that is not
    there.
    """
    if linear is None:
        linear = next((str(path) for path in _learned() if path.is_file()), None)
        if linear is None:
            raise FluxError(
                "LPIPS's learned weights (vgg.pth) are not on this machine: `pip install --no-deps lpips` "
                "brings them, or name the file in model.lpips.linear"
            )
    if vgg is None:
        kept = _torch_cache() / VGG16_FILE
        vgg = str(kept) if kept.is_file() else VGG16_ON_THE_HUB
    for name in (vgg, linear):
        if not name.startswith("hf://") and not _local(name).is_file():
            raise FluxError(f"LPIPS: no file {name}")
    return vgg, linear


def _learned() -> list[Path]:
    """Where the packages that ship the learned weights keep them, and where a download of them would be."""
    found = [_torch_cache() / "vgg.pth"]
    for package, *parts in LEARNED:
        spec = importlib.util.find_spec(package)
        folders = (spec.submodule_search_locations or ()) if spec else ()
        found += [Path(folder, *parts) for folder in folders]
    return found


def _torch_cache() -> Path:
    """PyTorch's folder of downloaded weights."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("TORCH_HOME") or f"{cache}/torch").expanduser() / "hub" / "checkpoints"


def load(vgg: str, linear: str) -> LPIPS:
    """The network with the weights of two files, see `config.LpipsFiles`. FluxError if they do not fit."""
    found = {**_read(_local(vgg)), **_read(_local(linear))}
    model = LPIPS()
    numbers = [number for level in VGG16 for number, _ in level]
    wrong, weights = [], []
    for name, wanted in named_arrays(model.parameters()):
        part, index, *kind = name.split(".")
        named = (
            f"lin{index}.model.1.weight" if part == "linear" else f"features.{numbers[int(index)]}.{kind[0]}"
        )
        array = found.get(named, mx.zeros(0))
        if array.ndim == 4:
            array = array.transpose(0, 2, 3, 1)  # OIHW -> OHWI
        if part == "linear":
            array = array.reshape(-1)  # from (1, 1, 1, C)
        if array.shape != wanted.shape:
            wrong.append(named)
        weights.append((name, array.astype(mx.float32)))
    if wrong:
        raise FluxError(f"LPIPS: {vgg} and {linear} lack, or have in other shapes: {', '.join(wrong)}")
    model.load_weights(weights)
    return model


def _local(reference: str) -> Path:
    """The file of a path or of `hf://owner/repository/file`, which is downloaded if it must be."""
    if not reference.startswith("hf://"):
        return Path(reference).expanduser()
    parts = reference.removeprefix("hf://").split("/", 2)
    if len(parts) < 3:
        raise FluxError(f"{reference}: a file of the Hub is written hf://owner/repository/file")
    try:
        return checkpoints.fetch(f"{parts[0]}/{parts[1]}", parts[2])
    except FluxError as error:
        where = f"download.pytorch.org/models/{VGG16_FILE} into {_torch_cache()}"
        raise FluxError(f"{error}; LPIPS also takes {where}") from None


def _read(path: Path) -> Mapping[str, mx.array]:
    if not path.is_file():
        raise FluxError(f"LPIPS: no file {path}")
    return tensors.load([path]) if path.suffix == ".safetensors" else torchfile.load([path])
