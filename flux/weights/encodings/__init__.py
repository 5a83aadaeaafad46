"""Weights in other programs' encodings -> plain weights, lazily: one table, one row an encoding.

GGUF and MLX's quantized layers are elsewhere (gguf.py, quantize.py): the first is another kind of file,
and the second need not be widened.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import mlx.core as mx

from flux.errors import FluxError
from flux.weights.encodings import bitsandbytes, quanto, scaled, torchao
from flux.weights.encodings.layer import Layer


@dataclass(frozen=True)
class Encoding:
    """name: for error lines. signs: parts of a layer by which it is known (`LAYER.sign`). read: makes its
    weight of them, lazily. parts: what the layer has beside the weight, all of it used up.
    """

    name: str
    signs: tuple[str, ...]
    read: Callable[[Layer], mx.array]
    parts: tuple[str, ...]


ENCODINGS = (
    Encoding("scaled fp8", ("scale_weight", "weight_scale", "comfy_quant"), scaled.read, scaled.PARTS),
    Encoding(
        "bitsandbytes nf4 or fp4",
        tuple(bitsandbytes.STATE + kind for kind in bitsandbytes.KINDS),
        bitsandbytes.read,
        bitsandbytes.PARTS,
    ),
    Encoding("bitsandbytes int8", ("SCB",), bitsandbytes.read_8, bitsandbytes.PARTS_8),
    Encoding("optimum-quanto", ("weight._data", "weight._data._data"), quanto.read, quanto.PARTS),
    Encoding("torchao", ("_weight_qdata",), torchao.read, torchao.PARTS),
)

# Encodings that are known and not read: by the end of a tensor's name.
UNREAD = {
    ".wscales": "SVDQuant (nunchaku)",
    ".smooth_factor": "SVDQuant (nunchaku)",
    ".weight_scale_2": "nvfp4",
    ".weight_s_rel": "w4a8",
    ".trellis": "exl3",
    ".q_weight": "exl2",
    ".qzeros": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight.meta": "HQQ",
}
MARKERS = ("scaled_fp8",)  # in a file once, and not needed
INSTEAD = "use this model in bf16, fp8, GGUF, nf4 or MLX's 4 bits"


def decode(label: str, tensors: Mapping[str, mx.array], metadata: Mapping[str, str]) -> dict[str, mx.array]:
    """All of a part's tensors -> the same with plain weights, float32 where they were encoded. Lazy.

    label: what error lines call the file. metadata: of the headers. FluxError, by name, for what cannot be
    read.
    """
    for name in tensors:
        for sign, unread in UNREAD.items():
            if name.endswith(sign):
                raise FluxError(f"{label}: its weights are {unread}, which is not read: {INSTEAD}")
    out = dict(tensors)
    for layer, encoding in _encoded(tensors).items():
        found = Layer(layer, tensors, metadata)
        try:
            weight = encoding.read(found)
        except ValueError as error:
            raise FluxError(f"{label}: {layer} is {encoding.name}: {error}: {INSTEAD}") from None
        for part in encoding.parts:
            out.pop(f"{layer}.{part}", None)
        out[f"{layer}.weight"] = weight
    return {name: tensor for name, tensor in out.items() if name.rpartition(".")[2] not in MARKERS}


def _encoded(names: Mapping[str, mx.array]) -> dict[str, Encoding]:
    """The layers that are encoded, and how."""
    rows = {"." + sign: encoding for encoding in ENCODINGS for sign in encoding.signs}
    return {
        name.removesuffix(sign): encoding
        for name in names
        for sign, encoding in rows.items()
        if name.endswith(sign)
    }
