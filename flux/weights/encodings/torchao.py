"""torchao's tensors as diffusers saves them in safetensors files: `_weight_qdata`, `_weight_scale`, ...

The header's metadata says of which class a weight is. Int8Tensor, IntxUnpackedToInt8Tensor, Float8Tensor:
(data - zero point) * scale. Int4Tensor: two signed numbers in a byte, the even column in its lower half;
number * scale + zero point, which lie transposed (torchao's workflows/int4/int4_tensor.py).
"""

import mlx.core as mx

from flux import jsonfiles
from flux.weights.encodings.layer import Layer, times

WHOLE = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor")
PARTS = (
    *("_weight_qdata", "_weight_scale", "_weight_zero_point"),
    *("_weight_act_quant_scale", "_weight_act_quant_zero_point"),
)


def read(layer: Layer) -> mx.array:
    """The weight in float32."""
    description = layer.metadata.get(f"{layer.name}.weight")
    if description is None:
        raise ValueError("the header does not say of which class it is")
    kind = jsonfiles.parse_object(description).get("_type")
    data, scale = layer.need("_weight_qdata"), layer.need("_weight_scale")
    zero = layer.part("_weight_zero_point")
    if layer.part("_weight_act_pre_scale") is not None:
        raise ValueError("its inputs are scaled (act_pre_scale), which is not read")
    if kind in WHOLE:
        return times(data, scale, None if zero is None else -zero.astype(mx.float32) * scale)
    if kind == "Int4Tensor" and data.ndim == 2 and zero is not None:
        data = data.view(mx.uint8)
        numbers = mx.stack([data & 15, data >> 4], axis=-1).reshape(data.shape[0], -1)
        return times((numbers ^ 8).astype(mx.int32) - 8, scale.T, zero.T)
    raise ValueError(f"the class {jsonfiles.shown(kind)} is not read")
