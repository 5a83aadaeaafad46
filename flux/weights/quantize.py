"""Weights of few bits: which layers, and how a quantized network is written and read.

On MLX's CPU backend a quantized product is about 60 times slower than a product of the widened weights:
quantization saves memory there, and time on a GPU only.
"""

import json
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mode as mode_of
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from flux import jsonfiles
from flux.errors import FluxError

# Linear layers under these names: the blocks of the transformer, of T5, and of the captioner's two networks.
# The embedders, the final layer and the norms stay as they are: small, and first and last in line.
QUANTIZED = (
    *("double_blocks.", "single_blocks.", "encoder.block."),
    *("vision_tower.blocks.", "language_model.encoder.layers.", "language_model.decoder.layers."),
)
KINDS = {  # what people ask for -> bits and MLX's mode
    **{str(bits): (bits, "affine") for bits in (3, 4, 5, 6, 8)},
    **{"mxfp4": (4, "mxfp4"), "mxfp8": (8, "mxfp8"), "nvfp4": (4, "nvfp4")},
}
GROUP_SIZES = {"affine": (64, 32, 128), "mxfp4": (32,), "mxfp8": (32,), "nvfp4": (16,)}  # the default first
METADATA = "quantization"  # the key in a safetensors header, and in a config.json beside one
PARTS = ("weight", "scales", "biases")  # of a quantized layer

# The bits that are read, in each of MLX's modes.
READ_BITS = {"affine": (2, 3, 4, 5, 6, 8), "mxfp4": (4,), "nvfp4": (4,), "mxfp8": (8,)}


def quantize(
    network: nn.Module, bits: int = 4, group_size: int | None = None, mode: str = "affine"
) -> nn.Module:
    """Quantizes the blocks of a transformer, a T5 encoder or a captioner itself, lazily, and returns it.

    bits, mode: a value of `KINDS`. In the mode "affine" 64 (or 32, or 128: group_size) weights share a scale
    and an offset; the others are floats of few bits, of which 32 (nvfp4: 16) share a scale. A layer whose
    input size is not a multiple of 64 is quantized in groups of 32 unless group_size is given; where no group
    fits, it stays as it is, as does one that its file has quantized. `report` says what became of them.
    FluxError for other values.
    """
    if (bits, mode) not in KINDS.values():
        raise FluxError(f"cannot quantize to {bits} bits by {mode!r}: choose one of {', '.join(KINDS)}")
    sizes = GROUP_SIZES[mode]
    if group_size is not None and group_size not in sizes:
        raise FluxError(f"cannot quantize in groups of {group_size}: choose {' or '.join(map(str, sizes))}")

    def how(path: str, layer: nn.Module) -> dict[str, Any] | bool:
        if not isinstance(layer, nn.Linear) or not path.startswith(QUANTIZED):
            return False
        size = group_size_of(layer.weight.shape[1], mode) if group_size is None else group_size
        fits = size is not None and layer.weight.shape[1] % size == 0
        return fits and {"group_size": size, "bits": bits, "mode": mode}

    nn.quantize(network, class_predicate=how)
    return network


def read_kind(text: str | int) -> tuple[int, str]:
    """Bits and mode of one of `KINDS`; FluxError for another."""
    if str(text) not in KINDS:
        raise FluxError(f"cannot quantize to {text}: choose one of {', '.join(KINDS)}")
    return KINDS[str(text)]


def group_size_of(width: int, mode: str = "affine") -> int | None:
    """The first size of a group of the mode that divides a layer's input; None where none does."""
    return next((size for size in GROUP_SIZES[mode] if width % size == 0), None)


def report(bits: int | str, **networks: nn.Module) -> str:
    """How many layers of each network are quantized and how, as one line; bits: what they were to be.

    "transformer 494 of 504 layers, 4 bits in groups of 64; T5 ...". Warns where none of any network is, and
    where layers have other bits, those of their file.
    """
    layers = {name: [layer for _, layer in network.named_modules()] for name, network in networks.items()}
    packed = {name: [m for m in all_ if isinstance(m, nn.QuantizedLinear)] for name, all_ in layers.items()}
    if not any(packed.values()):
        warnings.warn("nothing was quantized: no layer's input is a multiple of a group wide", stacklevel=2)
    kind = read_kind(bits)
    if other := sum((layer.bits, layer.mode) != kind for found in packed.values() for layer in found):
        warnings.warn(f"{other} layers stay as their file has them, not in {bits}", stacklevel=2)
    return "; ".join(
        f"{name} {len(found)} of {len(found) + sum(isinstance(m, nn.Linear) for m in layers[name])} layers"
        + _kinds(found)
        for name, found in packed.items()
    )


def _kinds(layers: Sequence[nn.QuantizedLinear]) -> str:
    """ ", 4 bits in groups of 64", or each kind with its count where there are several."""
    kinds = Counter(
        f"{f'{layer.bits} bits' if layer.mode == 'affine' else layer.mode} in groups of {layer.group_size}"
        for layer in layers
    )
    counted = len(kinds) > 1
    return "".join(f", {f'{n} in ' if counted else ''}{kind}" for kind, n in kinds.most_common())


def metadata_of(network: nn.Module) -> dict[str, str]:
    """What a file's header must say so that it can be read again; {} where no layer is quantized.

    As mlx-lm's config.json: the commonest kind of layer, and by their names those of another kind.
    """
    layers = {
        path: (layer.bits, layer.group_size, layer.mode)
        for path, layer in network.named_modules()
        if isinstance(layer, nn.QuantizedLinear)
    }
    if not layers:
        return {}
    commonest = mode_of(layers.values())
    others = {path: _kind(*kind) for path, kind in layers.items() if kind != commonest}
    return {METADATA: json.dumps(_kind(*commonest) | others)}


def _kind(bits: int, group_size: int, mode: str) -> dict[str, Any]:
    return {"bits": bits, "group_size": group_size, "mode": mode}


# --- Reading ---


@dataclass(frozen=True)
class Packed:
    """A quantized matrix: parts by PARTS, each with all of its rows; the modes of floats have no biases."""

    parts: Mapping[str, mx.array]
    bits: int
    group_size: int
    mode: str

    @property
    def kind(self) -> tuple[int, int, str]:
        """Bits, group size and mode."""
        return self.bits, self.group_size, self.mode

    def widened(self) -> mx.array:
        """The weights (out, in), lazily, in the scales' type."""
        biases = self.parts.get("biases")
        return mx.dequantize(self.parts["weight"], self.parts["scales"], biases, **_kind(*self.kind))


def split(
    tensors: Mapping[str, mx.array], metadata: Mapping[str, str], config: Mapping[str, Any]
) -> tuple[dict[str, mx.array], dict[str, Packed]]:
    """All tensors of a part -> the same with widened weights, lazily, and the quantized ones by their names.

    metadata, config: of its file and beside it. They tell the size of a group, 64 where none does; the bits
    follow from the shapes. ValueError for tensors that do not make up a quantized layer of MLX's.
    """
    layers = [name.removesuffix(".scales") for name in tensors if name.endswith(".scales")]
    if not layers:
        return dict(tensors), {}
    how, wide, packed = _description(metadata, config), dict(tensors), {}
    for layer in layers:
        parts = {part: wide.pop(f"{layer}.{part}") for part in PARTS if f"{layer}.{part}" in tensors}
        described = how.get(layer)
        packed[f"{layer}.weight"] = _packed(
            layer, parts, *_layout(described if isinstance(described, dict) else how)
        )
    wide |= {name: layer.widened() for name, layer in packed.items()}
    return wide, packed


def _description(metadata: Mapping[str, str], config: Mapping[str, Any]) -> dict[str, Any]:
    """What a file, or the config.json beside it, says of its quantized layers."""
    how = config.get(METADATA, {})
    if METADATA in metadata:
        how = jsonfiles.parse_object(metadata[METADATA])
    if not isinstance(how, dict):
        raise ValueError(f"its {METADATA} should be a JSON object")
    return how


def _layout(how: Mapping[str, Any]) -> tuple[int, str]:
    """The size of a group and MLX's mode that a description tells."""
    mode = how.get("mode", "affine")
    if not isinstance(mode, str) or mode not in GROUP_SIZES:
        raise ValueError(f"its {METADATA} has the mode {jsonfiles.shown(mode)}")
    size, bits = how.get("group_size", GROUP_SIZES[mode][0]), how.get("bits", READ_BITS[mode][0])
    if size not in GROUP_SIZES[mode] or bits not in READ_BITS[mode]:
        size, bits = jsonfiles.shown(size), jsonfiles.shown(bits)
        raise ValueError(f"its {METADATA} has groups of {size} and {bits} bits, which MLX does not have")
    return size, mode


def _packed(layer: str, parts: Mapping[str, mx.array], group_size: int, mode: str) -> Packed:
    wanted = PARTS if mode == "affine" else PARTS[:2]
    if missing := [f"{layer}.{part}" for part in wanted if part not in parts]:
        raise ValueError(f"missing: {', '.join(missing)}")
    weight, scales = parts["weight"], parts["scales"]
    shapes = {parts[part].shape for part in wanted[1:]}
    flat = weight.ndim == scales.ndim == 2 and scales.size > 0
    if not flat or weight.dtype != mx.uint32 or len(shapes) > 1:
        raise ValueError(f"{layer}: its weight, scales and biases do not make up a quantized layer")
    bits, rest = divmod(32 * weight.shape[1], scales.shape[1] * group_size)
    if rest or bits not in READ_BITS[mode] or weight.shape[0] != scales.shape[0]:
        shapes_of = f"{tuple(weight.shape)} and scales {tuple(scales.shape)}"
        raise ValueError(f"{layer}: a weight {shapes_of} cannot be split into groups of {group_size}")
    return Packed(parts, bits, group_size, mode)


def prepare(
    network: nn.Module,
    packed: Mapping[str, Packed],
    to_ours: Callable[[dict[str, mx.array]], Mapping[str, mx.array]],
) -> dict[str, mx.array]:
    """Gives a network quantized layers where its file has them; returns the parameters of these.

    to_ours: the map from the file's names to the network's. Rows of several weights are put one under another
    by it; where these are not all quantized alike, the layer stays wide. Nothing is computed: what
    stands in the network before the parameters are loaded is never evaluated.
    """
    weights: dict[str, mx.array] = {}
    kinds: dict[str, tuple[int, int, str]] = {}
    linear = {path for path, layer in network.named_modules() if isinstance(layer, nn.Linear)}
    for kind in {layer.kind for layer in packed.values()}:
        alike = {name: layer for name, layer in packed.items() if layer.kind == kind}
        for part in {part for layer in alike.values() for part in layer.parts}:
            for name, tensor in to_ours({name: layer.parts[part] for name, layer in alike.items()}).items():
                path = name.removesuffix(".weight")
                if path in linear:
                    weights[f"{path}.{part}"] = tensor
                    kinds[path] = kind

    def how(path: str, layer: nn.Module) -> dict[str, Any] | bool:
        return path in kinds and _kind(*kinds[path])

    nn.quantize(network, class_predicate=how)
    return weights
