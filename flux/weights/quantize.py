"""Weights of 4 or 8 bits: which layers, and how a quantized network is written and read.

On MLX's CPU backend a quantized product is about 60 times slower than a product of the widened weights:
quantization saves memory there, and time on a GPU only.
"""

import json
from collections.abc import Iterable, Mapping

import mlx.nn as nn

from flux import jsonfiles
from flux.errors import FluxError
from flux.jsonfiles import shown

# Linear layers under these names: the blocks of the transformer, of T5, and of the captioner's two networks.
# The embedders, the final layer and the norms stay as they are: small, and first and last in line.
QUANTIZED = (
    *("double_blocks.", "single_blocks.", "encoder.block."),
    *("vision_tower.blocks.", "language_model.encoder.layers.", "language_model.decoder.layers."),
)
BITS = (4, 8)
READ_BITS = (2, 3, 4, 5, 6, 8)  # of MLX
GROUP_SIZES = {"affine": (64, 32, 128), "mxfp4": (32,)}  # by mode, the default first
METADATA = "quantization"  # the key in a safetensors header


def quantize(
    network: nn.Module, bits: int = 4, group_size: int | None = None, mode: str = "affine"
) -> nn.Module:
    """Quantizes the blocks of a transformer, a T5 encoder or a captioner in place, lazily, and returns it.

    bits: 4 or 8 a weight. mode: "affine", where 64 (or 32, or 128: group_size) weights share a scale and an
    offset, or "mxfp4", 4-bit floats of which 32 share a scale. A layer whose input size is no multiple of the
    group size stays as it is. FluxError for other values.
    """
    if mode not in GROUP_SIZES:
        raise FluxError(f"cannot quantize by {mode!r}: choose {' or '.join(GROUP_SIZES)}")
    if bits not in BITS or (mode == "mxfp4" and bits != 4):
        raise FluxError(f"cannot quantize to {bits} bits: choose 4 or 8 (mxfp4: 4 only)")
    sizes = GROUP_SIZES[mode]
    group_size = sizes[0] if group_size is None else group_size
    if group_size not in sizes:
        raise FluxError(f"cannot quantize in groups of {group_size}: choose {' or '.join(map(str, sizes))}")

    def fits(path: str, layer: nn.Module) -> bool:
        chosen = isinstance(layer, nn.Linear) and path.startswith(QUANTIZED)
        return chosen and layer.weight.shape[1] % group_size == 0

    nn.quantize(network, group_size, bits, mode=mode, class_predicate=fits)
    return network


def metadata_of(network: nn.Module) -> dict[str, str]:
    """What a file's header must say so that `prepare` can read it again; {} where none is quantized."""
    layers = [layer for _, layer in network.named_modules() if isinstance(layer, nn.QuantizedLinear)]
    if not layers:
        return {}
    kinds = {(layer.bits, layer.group_size, layer.mode) for layer in layers}
    if len(kinds) > 1:
        raise FluxError(f"layers are quantized in {len(kinds)} different ways; a file can tell one only")
    bits, group_size, mode = kinds.pop()
    return {METADATA: json.dumps({"bits": bits, "group_size": group_size, "mode": mode})}


def prepare(network: nn.Module, metadata: Mapping[str, str], names: Iterable[str]) -> None:
    """Gives a network that is about to be loaded quantized layers where the file has them.

    names: the file's tensors; a layer with `.scales` among them is quantized. Nothing is computed: the
    values that this puts there are replaced before anything evaluates them.
    """
    if METADATA not in metadata:
        return
    layers = {name.removesuffix(".scales") for name in names if name.endswith(".scales")}
    how = jsonfiles.parse_object(metadata[METADATA])
    wrong = how.keys() != {"bits", "group_size", "mode"} or not isinstance(how["mode"], str)
    if wrong or how["bits"] not in READ_BITS or how["group_size"] not in GROUP_SIZES.get(how["mode"], ()):
        raise FluxError(f"its {METADATA} is {shown(metadata[METADATA])}, which is not known")
    nn.quantize(network, **how, class_predicate=lambda path, _: path in layers)
