"""bitsandbytes' nf4 and fp4 (QLoRA, arXiv 2305.14314) and int8 (LLM.int8(), arXiv 2208.07339).

4 bits: each is an entry of `quant_map`, times the largest value (`absmax`) of its block of weights, which in
turn may be bytes: entries of `nested_quant_map` times `nested_absmax`, plus an offset. In int8 a row is
multiplied by its largest value / 127.
"""

import math

import mlx.core as mx

from flux import jsonfiles
from flux.weights.encodings.layer import Layer, block_size, times

KINDS = ("nf4", "fp4")
STATE = "weight.quant_state.bitsandbytes__"
PARTS = (
    *("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"),
    *(STATE + kind for kind in KINDS),
)
PARTS_8 = ("SCB", "weight_format")


def read(layer: Layer) -> mx.array:
    """The weight of a layer of 4 bits, in float32."""
    kind = next(kind for kind in KINDS if layer.part(STATE + kind) is not None)
    state = layer.json(STATE + kind)
    shape = state.get("shape")
    if not isinstance(shape, list) or not all(type(side) is int and 0 < side < 2**31 for side in shape):
        raise ValueError(f"its description's shape is {jsonfiles.shown(shape)}")
    table, packed = layer.need("weight.quant_map"), layer.need("weight").reshape(-1).view(mx.uint8)
    largest = _largest(layer, state)
    count, block = math.prod(shape), block_size(state, "blocksize")
    if packed.size != math.ceil(count / 2) or largest.size != math.ceil(count / block) or table.size != 16:
        raise ValueError(f"its tensors do not make up the shape {shape}")
    fours = mx.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)[:count]
    return (table.astype(mx.float32)[fours] * mx.repeat(largest, block)[:count]).reshape(shape)


def _largest(layer: Layer, state: dict) -> mx.array:
    """The largest value of each block, in float32: (blocks,)."""
    largest, nested = layer.need("weight.absmax").reshape(-1), layer.part("weight.nested_absmax")
    if nested is None:
        return largest.astype(mx.float32)
    table, block = layer.need("weight.nested_quant_map"), block_size(state, "nested_blocksize")
    offset = state.get("nested_offset")
    if largest.dtype != mx.uint8 or table.size != 256 or not isinstance(offset, float | int):
        raise ValueError("its nested scales make no sense")
    if nested.size != math.ceil(largest.size / block):
        raise ValueError("its nested scales are too few or too many")
    outer = mx.repeat(nested.reshape(-1).astype(mx.float32), block)[: largest.size]
    return table.astype(mx.float32)[largest] * outer + offset


def read_8(layer: Layer) -> mx.array:
    """The weight of a layer of 8 bits, in float32."""
    order = layer.part("weight_format")
    if order is not None and order.size == 1 and order.item() != 0:
        raise ValueError("its rows are stored in a GPU's order; save the model again with bitsandbytes 0.45")
    weight = layer.need("weight")
    if weight.dtype != mx.int8:
        raise ValueError(f"its weight is {weight.dtype}")
    return times(weight, layer.need("SCB").reshape(-1, 1).astype(mx.float32) / 127)
