"""Scaled fp8 and int8 as ComfyUI's files have them: the weight times its scale.

The old spelling is `scale_weight` (with `scale_input`, and one `scaled_fp8` in the file), today's
`weight_scale` (with `input_scale`, and a `comfy_quant` that names the format). The scale of the input is for
products in fp8 and is not used.
"""

import mlx.core as mx

from flux import jsonfiles
from flux.weights.encodings.layer import Layer, times

READ = ("float8_e4m3fn", "float8_e5m2", "int8")  # and what begins with them: _rowwise, _blockwise, ...
PARTS = ("weight_scale", "scale_weight", "input_scale", "scale_input", "comfy_quant")


def read(layer: Layer) -> mx.array:
    """The weight in float32; as it is where the layer has no scale."""
    description = layer.json("comfy_quant")
    kind = description.get("format", READ[0])
    if not isinstance(kind, str) or not kind.startswith(READ):
        raise ValueError(f"the format {jsonfiles.shown(kind)} is not read")
    if "convrot" in str(description):
        raise ValueError("its weights are rotated (convrot), which is not read")
    weight, scale = layer.need("weight"), layer.part("weight_scale")
    scale = layer.part("scale_weight") if scale is None else scale
    if scale is None:
        return weight
    if not mx.issubdtype(scale.dtype, mx.floating):
        raise ValueError("its scales are exponents (mxfp8), which are not read")
    return times(weight, scale)
