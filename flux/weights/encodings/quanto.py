"""optimum-quanto's weights, as diffusers saves them: qint8 and qfloat8 (`weight._data`), qint4 and qint2.

8 bits: the data times a scale. Fewer: groups of weights, (groups, size), whose rows are packed so that a byte
holds a row of the first half and, above it, one of the second; times a scale, minus a shift.
"""

import mlx.core as mx

from flux.weights.encodings.layer import Layer, times

PARTS = (
    *("weight._data", "weight._data._data", "weight._scale", "weight._shift"),
    *("input_scale", "output_scale"),
)


def read(layer: Layer) -> mx.array:
    """The weight in float32."""
    scale = layer.need("weight._scale")
    if layer.part("weight._data") is not None:
        return times(layer.need("weight._data"), scale)
    packed, shift = layer.need("weight._data._data"), layer.need("weight._shift")
    groups = scale.size
    if packed.dtype != mx.uint8 or packed.ndim != 2 or scale.shape != (groups, 1) != shift.shape:
        raise ValueError("its groups are not along the rows")
    bits = 4 if 2 * packed.shape[0] >= groups else 2
    values = mx.concatenate([(packed >> low) & (2**bits - 1) for low in range(0, 8, bits)])[:groups]
    if values.shape[0] != groups:
        raise ValueError(f"it has {groups} scales for {values.shape[0]} groups")
    return _ungrouped(_shifted(values, scale, shift), layer)


def _shifted(values: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    if mx.issubdtype(shift.dtype, mx.floating):
        return times(values, scale, -shift)
    return times(values.astype(mx.int32) - shift.astype(mx.int32), scale)


def _ungrouped(weights: mx.array, layer: Layer) -> mx.array:
    """(groups, size) -> (O, I). The file does not say how many rows a weight has; its bias does."""
    bias = layer.part("bias")
    if bias is None:
        raise ValueError("without a bias its shape cannot be told")
    if weights.size % max(bias.size, 1):
        raise ValueError(f"{weights.size} weights are not a matrix of {bias.size} rows")
    return weights.reshape(bias.size, -1)
